"""The infer service inside Envoy: what the dynamic module imports. `python -m services.infer` becomes that Envoy."""

from __future__ import annotations

import os
from functools import partial

from mesh import telemetry
from mesh.embedded.entry import Host
from mesh.embedded.server import EmbeddedServer
from services.infer.app import Front, run
from services.infer.config import InferConfig
from services.infer.core import InferenceServer
from services.infer.rpc import inference_rpc, short_methods


def _server(host: Host, config: InferConfig, core: InferenceServer) -> EmbeddedServer:
    return EmbeddedServer(
        host.app,
        config.listen,
        [inference_rpc(core)],
        drain_ms=config.drain_ms,
        short=short_methods(core) if telemetry.collector(os.environ) is None else {},
        admin_path=host.admin_path,
    )


async def _run(config: InferConfig, host: Host) -> None:
    await run(config, Front("envoy", partial(_server, host), host.until_stopped))


app = Host("infer", InferConfig, _run).app
