"""`python -m tests.mesh.fronts FRONT`: the test service behind one front, until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial

from mesh.h2.server import H2Server
from mesh.main import main
from mesh.node import folder
from mesh.node.edge import Edge
from mesh.server import GrpcServer, until_stopped
from tests.mesh.fronts import service
from tests.mesh.fronts.config import FrontsConfig


def _server(name: str, config: FrontsConfig, served: service.Service, listen: str) -> GrpcServer | H2Server:
    rpcs = [service.rpc(served)]
    if name == "grpc":
        return GrpcServer(listen, rpcs, drain_ms=config.drain_ms)
    return H2Server(listen, rpcs, drain_ms=config.drain_ms, short=service.short_methods(served))


async def _run(name: str, config: FrontsConfig) -> None:
    if name == "envoy":
        await _run_behind_envoy(config)
        return
    served = service.Service()
    async with served.tasked, _server(name, config, served, config.listen) as server:
        await server.serve()
        await until_stopped()


async def _run_behind_envoy(config: FrontsConfig) -> None:
    """Serve over h2 on a unix socket, behind an Envoy as `shoal serve` starts it."""
    served = service.Service()
    host, _, port = config.listen.rpartition(":")
    with folder.private(os.environ) as place:
        path = f"{place}/fronts-0.sock"
        edge = Edge(host=host, port=int(port), workers=[path], folder=place, threads=1, tell=print)
        fronting = asyncio.create_task(edge.run())
        async with served.tasked, _server("h2", config, served, f"unix:{path}") as server:
            await server.serve()
            await until_stopped()
            await edge.drain()
        await edge.flush()
        edge.stop()
        await fronting


if __name__ == "__main__":
    main("fronts", FrontsConfig, partial(_run, sys.argv[1]))
