"""The server of a service that is called by its own Envoy, or by programs of its machine: which front it gets.

unix socket, loopback ──> h2 (mesh.h2)       several times cheaper a call; only this machine can reach it
any other address ──────> grpc (mesh.server)  its HTTP/2 stands up to strangers
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol, TypeAlias

from mesh import telemetry
from mesh.asgi.exchange import ShortHandler
from mesh.front import is_local
from mesh.h2.server import H2Server
from mesh.server import GrpcServer, Rpc

Front: TypeAlias = Literal["auto", "h2", "grpc"]
"""What a service may be told. auto: h2 where only this machine can reach the address."""


class Server(Protocol):
    """Either of them."""

    address: str
    """Where it really listens."""

    async def __aenter__(self) -> Server: ...

    async def serve(self) -> None: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def server(
    listen: str, rpcs: Sequence[Rpc], *, drain_ms: int, front: Front = "auto", short: Mapping[str, ShortHandler]
) -> Server:
    """A server of `rpcs` at `listen`; used as `async with`, as both are.

    Args:
        short: methods that are answered without a task, by path. Not used over grpc.aio, and not where traces are asked
            for: each call wants a span then.
    """
    if front == "grpc" or (front == "auto" and not is_local(listen)):
        return GrpcServer(listen, rpcs, drain_ms=drain_ms)
    is_traced = telemetry.collector(os.environ) is not None
    return H2Server(listen, rpcs, drain_ms=drain_ms, short={} if is_traced else short)
