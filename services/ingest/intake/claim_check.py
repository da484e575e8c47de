"""Claim check: large requests are uploaded to the store, and fetched by their digest.

    submit ──request──> store (PutArtifact, reference job/<database>/<job id>, tenant)   then the job is written
    attempt ──digest──> store ──request──> infer
    end ──> ReleaseArtifacts: the store removes artifacts without references

Requests count for the job's tenant. The store accepts the request of an admitted submit in any case, and reports when
the tenant is over its quota: `on_over` then has later submits rejected.

Equal requests are one artifact with several references. While the store is unavailable, requests are kept in MongoDB:
submits do not depend on the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from mesh.rpc.channel import AnyChannel
from mesh.rpc.interceptors import translate
from services.ingest.store_calls import store_errors
from shoal.errors import DataLoss, NotFound
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
# Longest wait of a submit for the store; then its request goes to MongoDB. 12 MiB take 0.1 s.
_PUT_S = 3.0
_GET_S = 20.0
_CALL_TIMEOUT_S = 10.0
# After a failed upload, requests go to MongoDB for this long.
_PAUSE_S = 5.0
_RELEASED_AT_ONCE = 1_000
_LISTED_AT_ONCE = 1_000


class ClaimCheck:
    """Requests of jobs in the store.

    Args:
        database: distinguishes the jobs of several ingests that share a store.
        on_over: called with the usage of a tenant that is over its quota.
    """

    def __init__(
        self,
        channel: AnyChannel,
        database: str,
        monotonic: Callable[[], float],
        on_over: Callable[[pb.TenantUsage], None],
    ) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)
        self._prefix = f"job/{database}/"
        self._monotonic = monotonic
        self._on_over = on_over
        self._paused_until = 0.0

    async def upload(self, job_id: str, tenant: str, request: bytes) -> str | None:
        """Store a job's request durably, and return its digest; None when the store is unavailable."""
        if self._monotonic() < self._paused_until:
            return None
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(request).hexdigest())
        header = pb.PutArtifactRequest.Header(
            sha256=sha256, size_bytes=len(request), reference=self._prefix + job_id, tenant=tenant
        )
        try:
            response = await self._stub.PutArtifact(_upload(header, request), timeout=_PUT_S)
        except grpc.RpcError as err:
            log.warning(
                "large requests go to MongoDB: the store does not accept them: %(error)s",
                {"event": "payloads.kept_in_mongo", "error": translate(err)},
            )
            self._paused_until = self._monotonic() + _PAUSE_S
            return None
        if response.HasField("over_quota"):
            self._on_over(response.over_quota)
        return sha256

    async def fetch(self, job_id: str, sha256: str) -> bytes:
        """Return a job's request.

        Raises:
            DataLoss: the request is damaged or no longer in the store.
            ShoalError: the store is unavailable.
        """
        found = bytearray()
        try:
            with store_errors(f"fetching the request of job {job_id}"):
                async for part in self._stub.GetArtifact(pb.GetArtifactRequest(sha256=sha256), timeout=_GET_S):
                    found += part.chunk
        except (NotFound, DataLoss) as err:
            raise DataLoss(f"the request of job {job_id} is no longer in the store: {err.message}") from err
        if await asyncio.to_thread(lambda: hashlib.sha256(found).hexdigest()) != sha256:
            raise DataLoss(f"the request of job {job_id}: what the store sent does not hash to {sha256}")
        return bytes(found)

    async def release(self, job_ids: Sequence[str]) -> None:
        """Release the requests of these jobs.

        Raises:
            ShoalError: the store is unavailable.
        """
        for first in range(0, len(job_ids), _RELEASED_AT_ONCE):
            names = [self._prefix + job_id for job_id in job_ids[first : first + _RELEASED_AT_ONCE]]
            with store_errors("releasing requests of jobs"):
                await self._stub.ReleaseArtifacts(pb.ReleaseArtifactsRequest(references=names), timeout=_CALL_TIMEOUT_S)

    async def list_uploaded(self, before: str) -> AsyncIterator[list[str]]:
        """Yield the ids below `before` of jobs with uploaded requests, some at a time, in order.

        Raises:
            ShoalError: the store is unavailable.
        """
        after = self._prefix
        while True:
            page = pb.ListReferencesRequest(
                prefix=self._prefix, after=after, before=self._prefix + before, page_size=_LISTED_AT_ONCE
            )
            with store_errors("listing requests of jobs"):
                response = await self._stub.ListReferences(page, timeout=_CALL_TIMEOUT_S)
            if not response.references:
                return
            after = response.references[-1].name
            yield [reference.name.removeprefix(self._prefix) for reference in response.references]


async def _upload(header: pb.PutArtifactRequest.Header, request: bytes) -> AsyncIterator[pb.PutArtifactRequest]:
    yield pb.PutArtifactRequest(header=header)
    for at in range(0, len(request), _CHUNK_BYTES):
        yield pb.PutArtifactRequest(chunk=request[at : at + _CHUNK_BYTES])
