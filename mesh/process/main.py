"""Start of every service process: configuration, logs, tracing, event loop, and a clear message on failure."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any, NoReturn, TypeVar

import uvloop

from mesh.process import logs, telemetry
from mesh.process.config import ConfigError, ServiceConfig, load
from mesh.process.exits import WRONG_SETTINGS, exit_now
from mesh.process.log_levels import LogLevels

C = TypeVar("C", bound=ServiceConfig)

# Garbage collections, by generation. The first is seven times Python's default: calls leave few reference cycles
# behind. The second, of 10,000 objects, takes 2 ms. A full collection stops the process for 0.2 us an object, so
# FreedMemory chooses its time.
_COLLECTED_AT = 5_000, 2, 1_000_000
_NO_ADDRESS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)


def configured(service: str, cls: type[C]) -> C | None:
    """Return the configuration of this process; None when it is invalid, after printing the errors."""
    try:
        return load(cls, service, os.environ)
    except ConfigError as err:
        print(f"shoal {service} cannot start:\n{err}", file=sys.stderr)
        return None


def main(service: str, cls: type[C], run: Callable[[C], Coroutine[Any, Any, None]]) -> None:
    """Run `run(config)` until it returns, and exit with 0; with 2 for an invalid configuration, with 1 on failure."""
    config = configured(service, cls)
    if config is None:
        sys.exit(WRONG_SETTINGS)
    logs.configure(f"{config.node}/{config.instance}", config.log_level)
    try:
        uvloop.run(_run_and_exit(service, config, run))
    except OSError as err:
        if err.errno not in _NO_ADDRESS:
            raise
        print(f"shoal {service} cannot start:\ncannot listen on {config.listen}: {err.strerror}", file=sys.stderr)
        sys.exit(1)


async def _run_and_exit(service: str, config: C, run: Callable[[C], Coroutine[Any, Any, None]]) -> NoReturn:
    with telemetry.tracing(service, f"{config.node}/{config.instance}", keeps=config.metrics is not None):
        # Imported objects live as long as the process: exclude them from garbage collection.
        gc.freeze()
        gc.set_threshold(*_COLLECTED_AT)
        gc.enable()
        levels = config.log_levels
        async with LogLevels(levels, config.instance) if levels is not None else nullcontext():
            await run(config)
    # Here, before the event loop waits for its threads.
    exit_now(0)
