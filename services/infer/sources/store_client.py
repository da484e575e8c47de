"""Client of the store, over the mesh: watches the registry and reads artifacts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from mesh.rpc.interceptors import translated
from shoal.errors import DeadlineExceeded, NotFound
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc as pb_grpc

# A download without data for this long is broken, and is resumed on a new call.
_SILENCE_S = 30.0


class StoreClient:
    """Calls the store over `channel`, which its owner closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = pb_grpc.StoreServiceStub(channel)

    async def watch(self) -> AsyncIterator[pb.WatchModelsResponse]:
        """Yield the registry now and after each change. Raises ShoalError when the watch breaks."""
        with translated("watching the registry"):
            call = self._stub.WatchModels(pb.WatchModelsRequest())
            try:
                async for snapshot in call:
                    yield snapshot
            finally:
                call.cancel()

    async def check_sees(self, caller: bytes, sha256: str) -> None:
        """Check that a caller sees an artifact. Raises NotFound as for one that is not stored; ShoalError."""
        action = f"looking for artifact {sha256}"
        with translated(action):
            try:
                request = pb.StatArtifactRequest(sha256=sha256, caller=caller)
                found = await self._stub.StatArtifact(request, timeout=_SILENCE_S)
                is_seen = found.HasField("artifact")
            except grpc.aio.AioRpcError as err:
                if err.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                is_seen = False
        if not is_seen:
            raise NotFound(f"{action}: it is not stored for the caller's tenant: upload it")

    async def read(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an artifact from `offset` on. Raises ShoalError; DeadlineExceeded after a long silence."""
        with translated(f"reading artifact {sha256}"):
            call = self._stub.GetArtifact(pb.GetArtifactRequest(sha256=sha256, offset=offset))
            try:
                while True:
                    async with asyncio.timeout(_SILENCE_S):
                        part = await call.read()
                    if not isinstance(part, pb.GetArtifactResponse):
                        break  # grpc.aio.EOF
                    yield part.chunk
            except TimeoutError as err:
                raise DeadlineExceeded(f"reading artifact {sha256}: no data for {_SILENCE_S:.0f} s") from err
            finally:
                call.cancel()
