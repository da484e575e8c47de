"""Storage quotas: submits of tenants that are over their quota in the store are rejected.

    store ──ListUsage(over_quota)──every few seconds──────┐
    store ──PutArtifact(payload): over_quota──immediately─┴──> StorageQuotas ──> submit: RESOURCE_EXHAUSTED

An accepted job must be able to store its result, so the quota is enforced at intake. A tenant may exceed it by the
results of its queued jobs, and by submits until the next usage report. While the store is unavailable, the last report
holds.
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

READ_S = 5.0
_TIMEOUT_S = 2.0
_RETRY_AFTER_MS = 5_000


class StorageQuotas(Background):
    """Set of the tenants that are over their quotas, kept up to date in the background. Used as `async with`."""

    def __init__(self, channel: AnyChannel, *, read_s: float = READ_S) -> None:
        self._store = store_pb2_grpc.StoreServiceStub(channel)
        self._read_s = read_s
        self._over: Mapping[str, store_pb2.TenantUsage] = {}
        # Tenants marked since the last read.
        self._marked: dict[str, store_pb2.TenantUsage] = {}

    def admit(self, tenant: str) -> None:
        """Return when a job of `tenant` may be accepted.

        Raises:
            ResourceExhausted: the tenant is over its storage quota.
        """
        usage = self._over.get(tenant)
        if usage is not None:
            owner = f"tenant {tenant!r}" if tenant else "the default tenant"
            raise ResourceExhausted(
                f"the results and payloads of {owner} take {usage.bytes} bytes, and {usage.quota_bytes} are allowed: "
                "have results removed sooner (shoal store retention), or failed jobs with large requests (shoal jobs "
                "retention), or the quota raised (shoal store quota)",
                retry_after_ms=_RETRY_AFTER_MS,
            )

    def mark_over_quota(self, usage: store_pb2.TenantUsage) -> None:
        """Mark a tenant as over its quota, as the store reported with an accepted payload.

        The mark also outlives the next read, whose counters may be a second old.
        """
        self._marked[usage.tenant] = usage
        self._over = {**self._over, usage.tenant: usage}

    async def _run(self) -> None:
        await for_ever("read storage quotas", self._read, away_s=self._read_s, log=log, level=logging.DEBUG)

    async def _read(self) -> float:
        found: dict[str, store_pb2.TenantUsage] = {}
        token = ""
        while True:
            request = store_pb2.ListUsageRequest(over_quota=True, page_token=token)
            with store_errors("reading storage quotas"):
                response = await self._store.ListUsage(request, timeout=_TIMEOUT_S)
            found.update({usage.tenant: usage for usage in response.usages})
            token = response.next_page_token
            if not token:
                self._over, self._marked = {**self._marked, **found}, {}
                return self._read_s
