"""`python -m tests.mesh.fronts`: the test service, until SIGTERM."""

from __future__ import annotations

from mesh.main import main
from mesh.rpc.server import Server
from mesh.signals import until_stopped
from tests.mesh.fronts import service
from tests.mesh.fronts.config import FrontsConfig


async def _run(config: FrontsConfig) -> None:
    served = service.Service()
    fast = service.fast_methods(served)
    server = Server(config.listen, [service.rpc(served)], drain_ms=config.drain_ms, fast_methods=fast)
    async with served.tasks, server:
        await server.serve()
        await until_stopped()


if __name__ == "__main__":
    main("fronts", FrontsConfig, _run)
