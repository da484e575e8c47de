"""`python -m tests.mesh.fronts FRONT`: the test service behind one front, until SIGTERM."""

from __future__ import annotations

import os
import sys
from functools import partial

from mesh.h2.server import H2Server
from mesh.main import main
from mesh.server import GrpcServer, until_stopped
from tests.mesh.fronts import service
from tests.mesh.fronts.config import FrontsConfig


def _server(name: str, config: FrontsConfig, served: service.Service) -> GrpcServer | H2Server:
    rpcs = [service.rpc(served)]
    if name == "h2":
        return H2Server(config.listen, rpcs, drain_ms=config.drain_ms, short=service.short_methods(served))
    return GrpcServer(config.listen, rpcs, drain_ms=config.drain_ms)


async def _run(name: str, config: FrontsConfig) -> None:
    served = service.Service()
    async with served.tasked, _server(name, config, served) as server:
        await server.serve()
        await until_stopped()


if __name__ == "__main__":
    if sys.argv[1] == "envoy":
        from mesh.embedded import launch

        try:
            launch.become_envoy("tests.mesh.fronts.inside:app", os.environ["SHOAL_FRONTS_LISTEN"])
        except OSError as err:
            sys.exit(f"shoal fronts cannot start:\n{err}")
    main("fronts", FrontsConfig, partial(_run, sys.argv[1]))
