"""May this job come in? Every limit is asked, the cheapest first; mostly the answer is at hand.

    submit ──> is the node able to? ──> the tenant's quota ──> the tenant's rate ──> in
                    │ no                     │ full                 │ used up
                    └────────────────────────┴──────────────────────┴──> RESOURCE_EXHAUSTED, and when to come back

A stream waits instead, for a while, and is not read meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.ingest.tenants.bucket import Buckets
from services.ingest.tenants.pending import PendingCounts
from services.ingest.tenants.tenant_repository import TenantRepository
from shoal.errors import ResourceExhausted, ShoalError

PATIENCE_S = 30.0
"""How long an item of a stream waits to be let in: half of what clients wait for an acknowledgement."""
_LONGEST_WAIT_S = 2.0
# A limit may be raised meanwhile, or others' jobs be done sooner than was foreseen.


class Admission:
    """Lets jobs in. `gates` refuse for the whole node: they return, or raise ResourceExhausted."""

    def __init__(
        self,
        repository: TenantRepository,
        pending: PendingCounts,
        buckets: Buckets,
        gates: Sequence[Callable[[], None]],
    ) -> None:
        self._repository = repository
        self._pending = pending
        self._buckets = buckets
        self._gates = gates

    def try_admit(self, tenant: str) -> bool:
        """Lets a job of `tenant` in when nothing has to be asked for that. False: `admit` says.

        Raises:
            ResourceExhausted: the node takes none just now.
        """
        for gate in self._gates:
            gate()
        limits = self._repository.limits(tenant)
        if not (limits.max_pending or limits.rate):
            return True
        if limits.max_pending and not self._pending.has_known_capacity(tenant, limits.max_pending):
            return False
        if limits.rate:
            if not self._buckets.has_tokens(tenant):
                return False
            self._buckets.take_held(tenant)
        if limits.max_pending:
            self._pending.added(tenant, 1)
        return True

    async def admit(self, tenant: str) -> None:
        """Lets a job of `tenant` in.

        Raises:
            ResourceExhausted: its quota is full, or its rate used up. Unavailable: MongoDB is away.
        """
        for gate in self._gates:
            gate()
        limits = self._repository.limits(tenant)
        if limits.max_pending:
            await self._pending.admit(tenant, limits.max_pending)
        if limits.rate:
            try:
                await self._buckets.take(tenant, limits)
            except ShoalError:
                if limits.max_pending:
                    self._pending.added(tenant, -1)
                raise

    async def wait(self, tenant: str, patience_s: float = PATIENCE_S) -> None:
        """Lets a job of `tenant` in, as soon as there is room for it.

        Raises:
            ResourceExhausted: there was none for so long. Unavailable: MongoDB is away.
        """
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                if not self.try_admit(tenant):
                    await self.admit(tenant)
                return
            except ResourceExhausted as err:
                left_s = deadline - asyncio.get_running_loop().time()
                wait_s = min((err.retry_after_ms or 0) / 1000, _LONGEST_WAIT_S)
                if wait_s >= left_s:
                    raise
            await asyncio.sleep(max(0.001, wait_s))
