"""Large requests in the store: handed in there, and fetched with the digest that names them.

    submit ──request──> store (PutArtifact, reference job/<database>/<job id>, tenant)   then the job is written
    attempt ──digest──> store ──request──> infer
    end ──> ReleaseArtifacts: what nobody refers to any more, the store collects

It counts for the job's tenant. The store refuses no submit that was let in, but says then that the tenant has used up
its quota: `on_over` has the next ones refused.

Equal requests are one artifact with as many references. While the store does not answer, requests are kept in MongoDB,
as if there were no store: a submit does not depend on it.
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
_PUT_S = 3.0
# Longest that a submit waits for the store before its request goes to MongoDB instead. 12 MiB take 0.1 s.
_GET_S = 20.0
_ASK_S = 10.0
_UNAVAILABLE_WAIT_S = 5.0
# So long no other submit finds out for itself that the store does not answer.
_RELEASED_AT_ONCE = 1_000
_LISTED_AT_ONCE = 1_000


class ClaimCheck:
    """The store, as payloads need it.

    Args:
        database: tells the jobs of several ingests that share a store apart.
        on_over: hears of a tenant that has used up its quota.
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
        self._away_until = 0.0

    async def hand_in(self, job_id: str, tenant: str, request: bytes) -> str | None:
        """Stores a job's request, durably, and gives its digest. None: the store does not take it now."""
        if self._monotonic() < self._away_until:
            return None
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(request).hexdigest())
        header = pb.PutArtifactRequest.Header(
            sha256=sha256, size_bytes=len(request), reference=self._prefix + job_id, tenant=tenant
        )
        try:
            answer = await self._stub.PutArtifact(_upload(header, request), timeout=_PUT_S)
        except grpc.RpcError as err:
            log.warning("large requests go to MongoDB for now: the store does not take them: %s", translate(err))
            self._away_until = self._monotonic() + _UNAVAILABLE_WAIT_S
            return None
        if answer.HasField("over_quota"):
            self._on_over(answer.over_quota)
        return sha256

    async def fetch(self, job_id: str, sha256: str) -> bytes:
        """A job's request.

        Raises:
            DataLoss: it is damaged, or not there any more.
            ShoalError: the store is away.
        """
        found = bytearray()
        try:
            with store_errors(f"fetching the request of job {job_id}"):
                async for part in self._stub.GetArtifact(pb.GetArtifactRequest(sha256=sha256), timeout=_GET_S):
                    found += part.chunk
        except (NotFound, DataLoss) as err:
            raise DataLoss(f"the request of job {job_id} is not in the store any more: {err.message}") from err
        if await asyncio.to_thread(lambda: hashlib.sha256(found).hexdigest()) != sha256:
            raise DataLoss(f"the request of job {job_id}: what the store sent does not hash to {sha256}")
        return bytes(found)

    async def release(self, job_ids: Sequence[str]) -> None:
        """These jobs need their requests no more.

        Raises:
            ShoalError: the store is away.
        """
        for first in range(0, len(job_ids), _RELEASED_AT_ONCE):
            names = [self._prefix + job_id for job_id in job_ids[first : first + _RELEASED_AT_ONCE]]
            with store_errors("releasing requests of jobs"):
                await self._stub.ReleaseArtifacts(pb.ReleaseArtifactsRequest(references=names), timeout=_ASK_S)

    async def handed_in(self, before: str) -> AsyncIterator[list[str]]:
        """The ids of jobs below `before` whose requests are referred to, some at a time, in order.

        Raises:
            ShoalError: the store is away.
        """
        after = self._prefix
        while True:
            page = pb.ListReferencesRequest(
                prefix=self._prefix, after=after, before=self._prefix + before, page_size=_LISTED_AT_ONCE
            )
            with store_errors("looking for requests of jobs"):
                answer = await self._stub.ListReferences(page, timeout=_ASK_S)
            if not answer.references:
                return
            after = answer.references[-1].name
            yield [reference.name.removeprefix(self._prefix) for reference in answer.references]


async def _upload(header: pb.PutArtifactRequest.Header, request: bytes) -> AsyncIterator[pb.PutArtifactRequest]:
    yield pb.PutArtifactRequest(header=header)
    for at in range(0, len(request), _CHUNK_BYTES):
        yield pb.PutArtifactRequest(chunk=request[at : at + _CHUNK_BYTES])
