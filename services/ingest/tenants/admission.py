"""Admission of jobs: checks all limits, the cheapest first, mostly without a query.

    submit ──> limits of the node ──> the tenant's quota, its share of the backlog ──> its rate ──> accepted
                    │ reached              │ full                                        │ used up
                    └──────────────────────┴─────────────────────────────────────────────┴──> RESOURCE_EXHAUSTED,
                                                                                              with a retry-after

A stream waits instead for a while, and is not read meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.ingest.tenants.bucket import Buckets
from services.ingest.tenants.pending import PendingCounts
from services.ingest.tenants.settings import TenantLimits
from services.ingest.tenants.tenant_repository import TenantRepository
from shoal.errors import ResourceExhausted, ShoalError

T = TypeVar("T")

PATIENCE_S = 30.0
"""Maximum wait of a stream's item for admission: half of the time that clients wait for an acknowledgement."""
# Maximum time between checks: a limit may be raised, or jobs may end sooner than expected.
_LONGEST_WAIT_S = 2.0


class Admission:
    """Admission control.

    Args:
        node_limits: checks the node's limits for a job of a tenant: it returns, or raises ResourceExhausted.
        share: returns the number of jobs that a tenant may have queued of the backlog of all; None: no limit.
    """

    def __init__(
        self,
        repository: TenantRepository,
        pending: PendingCounts,
        buckets: Buckets,
        node_limits: Callable[[str], None],
        share: Callable[[], int | None],
    ) -> None:
        self._repository = repository
        self._pending = pending
        self._buckets = buckets
        self._check_node_limits = node_limits
        self._share = share

    def try_admit(self, tenant: str) -> bool:
        """Admit a job of `tenant` without a query. False: call `admit`, which may query MongoDB.

        Raises:
            ResourceExhausted: a limit of the node is reached.
        """
        self._check_node_limits(tenant)
        limits = self._repository.limits(tenant)
        quota, _ = self._quota(limits)
        if not (quota or limits.rate):
            return True
        if quota and not self._pending.has_known_capacity(tenant, quota):
            return False
        if limits.rate:
            if not self._buckets.has_tokens(tenant):
                return False
            self._buckets.take_held(tenant)
        if quota:
            self._pending.added(tenant, 1)
        return True

    async def admit(self, tenant: str) -> None:
        """Admit a job of `tenant`.

        Raises:
            ResourceExhausted: a limit of the node, the tenant's quota, its share of the backlog or its rate is reached.
            Unavailable: MongoDB is unavailable.
        """
        self._check_node_limits(tenant)
        limits = self._repository.limits(tenant)
        quota, reason = self._quota(limits)
        if quota:
            await self._pending.admit(tenant, quota, reason)
        if limits.rate:
            try:
                await self._buckets.take(tenant, limits)
            except ShoalError:
                if quota:
                    self._pending.added(tenant, -1)
                raise

    def _quota(self, limits: TenantLimits) -> tuple[int, str]:
        """Return the number of jobs that a tenant may have queued, and a name for it; 0 when there is no limit."""
        share = self._share()
        if share is None or 0 < limits.max_pending <= share:
            return limits.max_pending, "its quota"
        return share, "twice as many as all tenants together may still queue"

    async def wait(self, tenant: str, patience_s: float = PATIENCE_S) -> None:
        """Admit a job of `tenant` as soon as the limits allow it.

        Raises:
            ResourceExhausted: the limits do not allow it for `patience_s`. Unavailable: MongoDB is unavailable.
        """

        async def admit() -> None:
            if not self.try_admit(tenant):
                await self.admit(tenant)

        await when_possible(admit, patience_s)


async def when_possible(attempt: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """Return what `attempt` returns as soon as it raises no ResourceExhausted; raise that after `patience_s`."""
    deadline = asyncio.get_running_loop().time() + patience_s
    while True:
        try:
            return await attempt()
        except ResourceExhausted as err:
            left_s = deadline - asyncio.get_running_loop().time()
            wait_s = min((err.retry_after_ms or 0) / 1000, _LONGEST_WAIT_S)
            if wait_s >= left_s:
                raise
        await asyncio.sleep(max(0.001, wait_s))
