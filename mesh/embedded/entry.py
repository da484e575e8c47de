"""What Envoy imports to host a service: the twin of mesh.main.

Envoy imports the service's module on its main thread, then runs the app's lifespan on the loop's thread and begins to
listen. The service's own `run` starts there, and goes on beside the app; when it ends, the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from mesh import logs, telemetry
from mesh.config import ServiceConfig, load
from mesh.embedded import guard
from mesh.embedded.app import GrpcApp, task_factory
from mesh.embedded.launch import ADMIN_VARIABLE, FOLDER_VARIABLE
from mesh.limits import MESSAGE_BYTES
from mesh.server import until_stopped

log = logging.getLogger(__name__)

C = TypeVar("C", bound=ServiceConfig)

_SWITCH_S = 0.0005
# Python's threads hand the interpreter on that often at the latest: Envoy's side of the module waits for it at each
# call. With the usual 5 ms, one long turn of the loop would delay all calls that come meanwhile.

_STALL_S = 60.0
# Loading a large model or compiling may hold the interpreter for seconds; a minute is no load any more.


class Host:
    """The app, and what it runs for: one service, configured from the environment.

    Raises (at construction):
        ConfigError: a variable is wrong. It was checked before, by the process that became Envoy.
    """

    def __init__(self, service: str, cls: type[C], run: Callable[[C, Host], Coroutine[Any, Any, None]]) -> None:
        _settle()
        self.admin_path = os.environ.get(ADMIN_VARIABLE)
        self.app = GrpcApp(MESSAGE_BYTES)
        self._service = service
        self._config = load(cls, service, os.environ)
        self._run: Callable[[Any, Host], Coroutine[Any, Any, None]] = run
        logs.configure(f"{self._config.node}/{self._config.instance}", self._config.log_level)
        self.app.on_lifespan = self._start

    async def until_stopped(self) -> None:
        """As mesh.server.until_stopped, with the signals that the process blocked before it became Envoy."""
        await until_stopped(guard.on_signals)

    async def _start(self) -> None:
        asyncio.get_running_loop().set_task_factory(task_factory)
        self._main = asyncio.create_task(self._serve(), name=self._service)
        opened = asyncio.create_task(self.app.is_open.wait())
        await asyncio.wait({self._main, opened}, return_when=asyncio.FIRST_COMPLETED)

    async def _serve(self) -> None:
        status = 0
        beat = asyncio.create_task(guard.beat(_STALL_S), name="beat")
        try:
            with telemetry.tracing(self._service, f"{self._config.node}/{self._config.instance}"):
                await self._run(self._config, self)
        except BaseException:
            log.exception("%s cannot go on", self._service)
            status = 1
        beat.cancel()
        self._tidy()
        guard.leave(status)

    def _tidy(self) -> None:
        paths = [self.admin_path] if self.admin_path else []
        if self._config.listen.startswith("unix:"):
            paths.append(self._config.listen.removeprefix("unix:"))
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if (
            self.admin_path
            and Path(self.admin_path).parent.name.startswith("shoal-")
            and not os.listdir(Path(self.admin_path).parent)
        ):
            shutil.rmtree(Path(self.admin_path).parent, ignore_errors=True)


def _settle() -> None:
    """Makes the embedded interpreter one like any other: its path, its folder, its switch interval."""
    sys.path[:] = [path for path in sys.path if path not in ("", ".")]
    folder = os.environ.pop(FOLDER_VARIABLE, None)
    if folder is not None:
        os.chdir(folder)
    os.environ.pop("LD_PRELOAD", None)
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
