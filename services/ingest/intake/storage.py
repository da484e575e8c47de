"""Who has no room left for results: the store says so, and their submits are refused before there is a result.

    store ──ListUsage(over_quota)──every few seconds──> here ──> submit: RESOURCE_EXHAUSTED

A job that was accepted has a right to its result, so the quota is kept at the way in: a tenant may go beyond it by
what it has queued, and by what it submits until the next look. While the store is away, what it said last stands.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mesh.channel import AnyChannel
from mesh.tasks import Background, for_ever
from services.ingest.store_calls import asking_store
from shoal.errors import ResourceExhausted
from shoal.store.v1 import store_pb2, store_pb2_grpc

log = logging.getLogger(__name__)

LOOK_S = 5.0
_TIMEOUT_S = 2.0
_RETRY_AFTER_MS = 5_000


class Storage(Background):
    """Knows the tenants that have used up their quotas, while the `async with` block lasts."""

    def __init__(self, channel: AnyChannel, *, look_s: float = LOOK_S) -> None:
        self._store = store_pb2_grpc.StoreServiceStub(channel)
        self._look_s = look_s
        self._over: Mapping[str, store_pb2.TenantUsage] = {}

    def admit(self, tenant: str) -> None:
        """Lets a job of `tenant` in.

        Raises:
            ResourceExhausted: there is no room for its result.
        """
        usage = self._over.get(tenant)
        if usage is not None:
            whose = f"tenant {tenant!r}" if tenant else "the default tenant"
            raise ResourceExhausted(
                f"the results of {whose} take {usage.bytes} bytes, and {usage.quota_bytes} are allowed: have results "
                "removed sooner (shoal store retention), or the quota raised (shoal store quota)",
                retry_after_ms=_RETRY_AFTER_MS,
            )

    async def _run(self) -> None:
        await for_ever("look for quotas of storage", self._look, away_s=self._look_s, log=log, level=logging.DEBUG)

    async def _look(self) -> float:
        found: dict[str, store_pb2.TenantUsage] = {}
        token = ""
        while True:
            request = store_pb2.ListUsageRequest(over_quota=True, page_token=token)
            with asking_store("looking for quotas of storage"):
                answer = await self._store.ListUsage(request, timeout=_TIMEOUT_S)
            found.update({usage.tenant: usage for usage in answer.usages})
            token = answer.next_page_token
            if not token:
                self._over = found
                return self._look_s
