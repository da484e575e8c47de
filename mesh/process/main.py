"""What each service's `__main__` does: configuration, logs, tracing, event loop, and a clear word when it fails."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from mesh.process import logs, telemetry
from mesh.process.config import ConfigError, ServiceConfig, load
from mesh.process.exits import WRONG_SETTINGS

C = TypeVar("C", bound=ServiceConfig)

_COLLECTED_AT = 5_000
# Seven times Python's own: a call leaves few objects behind that only a collection would find.
_NO_ADDRESS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)


def configured(service: str, cls: type[C]) -> C | None:
    """The configuration of this process; None when it is wrong, which standard error then explains."""
    try:
        return load(cls, service, os.environ)
    except ConfigError as err:
        print(f"shoal {service} cannot start:\n{err}", file=sys.stderr)
        return None


def main(service: str, cls: type[C], run: Callable[[C], Coroutine[Any, Any, None]]) -> None:
    """Runs `run(config)` until it returns. Exits 2 when the configuration is wrong, 1 when it fails."""
    config = configured(service, cls)
    if config is None:
        sys.exit(WRONG_SETTINGS)
    logs.configure(f"{config.node}/{config.instance}", config.log_level)
    with telemetry.tracing(service, f"{config.node}/{config.instance}"):
        # What was imported lives as long as the process: no collection need look at it again.
        gc.freeze()
        gc.set_threshold(_COLLECTED_AT)
        try:
            uvloop.run(run(config))
        except OSError as err:
            if err.errno not in _NO_ADDRESS:
                raise
            print(f"shoal {service} cannot start:\ncannot listen on {config.listen}: {err.strerror}", file=sys.stderr)
            sys.exit(1)
