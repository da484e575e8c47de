"""Who has no room left in the store: it says so, and their submits are refused before there is a payload or a result.

    store ──ListUsage(over_quota)──every few seconds──┐
    store ──PutArtifact(payload): over_quota──at once─┴──> here ──> submit: RESOURCE_EXHAUSTED

A job that was accepted has a right to its result, so the quota is kept at the way in: a tenant may go beyond it by
what it has queued, and by what it submits until the store is heard. While the store is away, what it said last stands.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mesh.process.tasks import Background, for_ever
from mesh.rpc.channel import AnyChannel
from services.ingest.store_calls import store_errors
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
        self._heard: dict[str, store_pb2.TenantUsage] = {}
        # Since the last look.

    def admit(self, tenant: str) -> None:
        """Lets a job of `tenant` in.

        Raises:
            ResourceExhausted: there is no room for its payload and its result.
        """
        usage = self._over.get(tenant)
        if usage is not None:
            whose = f"tenant {tenant!r}" if tenant else "the default tenant"
            raise ResourceExhausted(
                f"the results and payloads of {whose} take {usage.bytes} bytes, and {usage.quota_bytes} are allowed: "
                "have results removed sooner (shoal store retention), or failed jobs with large requests (shoal jobs "
                "retention), or the quota raised (shoal store quota)",
                retry_after_ms=_RETRY_AFTER_MS,
            )

    def heard(self, usage: store_pb2.TenantUsage) -> None:
        """The store has said, with a payload that it took, that this tenant is over.

        That stands for the next look too: the counters that it sees may be a second behind.
        """
        self._heard[usage.tenant] = usage
        self._over = {**self._over, usage.tenant: usage}

    async def _run(self) -> None:
        await for_ever("look for quotas of storage", self._look, away_s=self._look_s, log=log, level=logging.DEBUG)

    async def _look(self) -> float:
        found: dict[str, store_pb2.TenantUsage] = {}
        token = ""
        while True:
            request = store_pb2.ListUsageRequest(over_quota=True, page_token=token)
            with store_errors("looking for quotas of storage"):
                answer = await self._store.ListUsage(request, timeout=_TIMEOUT_S)
            found.update({usage.tenant: usage for usage in answer.usages})
            token = answer.next_page_token
            if not token:
                self._over, self._heard = {**self._heard, **found}, {}
                return self._look_s
