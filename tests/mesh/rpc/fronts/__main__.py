"""`python -m tests.mesh.rpc.fronts [envoy]`: the test service, with an Envoy in front or without one, until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import sys

from mesh.process.main import main
from mesh.process.signals import until_stopped
from mesh.rpc.server import Server
from shoal.node import folder
from shoal.node.envoy_edge import Edge
from tests.mesh.rpc.fronts import service
from tests.mesh.rpc.fronts.config import FrontsConfig


def _server(config: FrontsConfig, served: service.Service, listen: str) -> Server:
    fast = service.fast_methods(served)
    return Server(
        listen,
        [service.rpc(served)],
        drain_ms=config.drain_ms,
        fast_methods=fast,
        body_bytes=config.body_bytes,
        unread_bytes=config.unread_bytes,
    )


async def _run(config: FrontsConfig) -> None:
    served = service.Service()
    async with served.tasks, _server(config, served, config.listen) as server:
        await server.serve()
        await until_stopped()


async def _run_behind_envoy(config: FrontsConfig) -> None:
    """Serve on a unix socket, behind an Envoy as `shoal serve` starts it."""
    served = service.Service()
    host, _, port = config.listen.rpartition(":")
    with folder.private(os.environ) as place:
        path = f"{place}/fronts-0.sock"
        edge = Edge(host=host, port=int(port), workers=[path], folder=place, threads=1, report=print)
        fronting = asyncio.create_task(edge.run())
        async with served.tasks, _server(config, served, f"unix:{path}") as server:
            await server.serve()
            await until_stopped()
            await edge.drain()
        await edge.flush()
        edge.stop()
        await fronting


if __name__ == "__main__":
    main("fronts", FrontsConfig, _run_behind_envoy if "envoy" in sys.argv else _run)
