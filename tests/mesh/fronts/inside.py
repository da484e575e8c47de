"""The test service inside Envoy."""

from __future__ import annotations

from mesh.embedded.entry import Host
from mesh.embedded.server import EmbeddedServer
from tests.mesh.fronts import service
from tests.mesh.fronts.config import FrontsConfig


async def _run(config: FrontsConfig, host: Host) -> None:
    served = service.Service()
    server = EmbeddedServer(
        host.app,
        config.listen,
        [service.rpc(served)],
        drain_ms=config.drain_ms,
        short=service.short_methods(served),
        admin_path=host.admin_path,
    )
    async with served.tasked, server:
        await server.serve()
        await host.until_stopped()


app = Host("fronts", FrontsConfig, _run).app
