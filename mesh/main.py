"""What each service's `__main__` does: configuration, logs, tracing, event loop, and a clear word when it fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from mesh import logs, telemetry
from mesh.config import ConfigError, ServiceConfig, load

C = TypeVar("C", bound=ServiceConfig)


def main(service: str, cls: type[C], run: Callable[[C], Coroutine[Any, Any, None]]) -> None:
    """Runs `run(config)` until it returns. Exits 2 when the configuration is wrong, 1 when it fails."""
    try:
        config = load(cls, service, os.environ)
    except ConfigError as err:
        print(f"shoal {service} cannot start:\n{err}", file=sys.stderr)
        sys.exit(2)
    logs.configure(f"{config.node}/{config.instance}", config.log_level)
    with telemetry.tracing(service, f"{config.node}/{config.instance}"):
        uvloop.run(run(config))
