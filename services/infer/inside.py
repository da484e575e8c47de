"""The infer service inside Envoy: what the dynamic module imports. `python -m services.infer` becomes that Envoy."""

from __future__ import annotations

from functools import partial

from mesh.embedded.entry import Host
from mesh.embedded.server import EmbeddedServer
from services.infer.app import Front, rpcs_of, run, short_way
from services.infer.config import InferConfig
from services.infer.core import InferenceServer


def _server(host: Host, config: InferConfig, core: InferenceServer) -> EmbeddedServer:
    return EmbeddedServer(
        host.app,
        config.listen,
        rpcs_of(config, core),
        drain_ms=config.drain_ms,
        short=short_way(core),
        admin_path=host.admin_path,
    )


async def _run(config: InferConfig, host: Host) -> None:
    await run(config, Front("envoy", partial(_server, host), host.until_stopped))


app = Host("infer", InferConfig, _run).app
