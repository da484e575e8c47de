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
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from mesh import logs, sockets, telemetry
from mesh.asgi.app import GrpcApp, task_factory
from mesh.config import ServiceConfig
from mesh.embedded import guard
from mesh.embedded.launch import (
    ADMIN_FOLDER,
    ADMIN_VARIABLE,
    FOLDER_VARIABLE,
    LISTEN_VARIABLE,
    PATH_VARIABLE,
    PYTHON_VARIABLE,
)
from mesh.exits import WRONG_SETTINGS
from mesh.limits import MESSAGE_BYTES
from mesh.main import configured
from mesh.server import until_stopped

log = logging.getLogger(__name__)

C = TypeVar("C", bound=ServiceConfig)

_SWITCH_S = 0.0005
# Python's threads hand the interpreter on that often at the latest: Envoy's side of the module waits for it at each
# call. With the usual 5 ms, one long turn of the loop would delay all calls that come meanwhile.

STALL_VARIABLE = "SHOAL_EMBEDDED_STALL_S"
_STALL_S = 60.0
# Loading a large model or compiling may hold the interpreter for seconds; a minute is no load any more.


class Host:
    """The app, and what it runs for: one service, configured from the environment.

    A wrong configuration ends the process as it ends that of any other front: a word on standard error, and 2.
    """

    def __init__(self, service: str, cls: type[C], run: Callable[[C, Host], Coroutine[Any, Any, None]]) -> None:
        _settle()
        self.admin_path = os.environ.get(ADMIN_VARIABLE)
        self.app = GrpcApp(MESSAGE_BYTES)
        self._service = service
        config = configured(service, cls)
        if config is None:
            self._tidy("")
            guard.leave(WRONG_SETTINGS)
        # With port 0, or the name of a host, the process that became Envoy has chosen.
        self._config = config.model_copy(update={"listen": os.environ.get(LISTEN_VARIABLE, config.listen)})
        self._run: Callable[[Any, Host], Coroutine[Any, Any, None]] = run
        logs.configure(f"{self._config.node}/{self._config.instance}", self._config.log_level)
        self.app.on_lifespan = self._start

    async def until_stopped(self) -> None:
        """As mesh.server.until_stopped, with the signals that the process blocked before it became Envoy."""
        await until_stopped(guard.on_signals)

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(task_factory)
        loop.set_exception_handler(_tell)
        self._main = asyncio.create_task(self._serve(), name=self._service)
        opened = asyncio.create_task(self.app.is_open.wait())
        await asyncio.wait({self._main, opened}, return_when=asyncio.FIRST_COMPLETED)

    async def _serve(self) -> None:
        status = 0
        stall_s = float(os.environ.get(STALL_VARIABLE) or _STALL_S)
        beat = asyncio.create_task(guard.beat(stall_s), name="beat")
        try:
            with telemetry.tracing(self._service, f"{self._config.node}/{self._config.instance}"):
                await self._run(self._config, self)
        except BaseException:
            log.exception("%s cannot go on", self._service)
            status = 1
        beat.cancel()
        self._tidy(self._config.listen)
        guard.leave(status)

    def _tidy(self, listen: str) -> None:
        sockets.remove(listen)
        if self.admin_path is not None:
            Path(self.admin_path).unlink(missing_ok=True)
        if self.admin_path is not None and Path(self.admin_path).parent.name.startswith(ADMIN_FOLDER):
            with contextlib.suppress(OSError):
                Path(self.admin_path).parent.rmdir()


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody has caught is an error in the log, but for an answer to a caller who has gone."""
    if type(context.get("exception")).__name__ != "ClientDisconnectedError":
        loop.default_exception_handler(context)


def _settle() -> None:
    """Makes the embedded interpreter one like any other: its path, its folder, its switch interval."""
    sys.path[:] = [path for path in sys.path if path not in ("", ".")]
    folder = os.environ.pop(FOLDER_VARIABLE, None)
    if folder is not None:
        os.chdir(folder)
    os.environ.pop("LD_PRELOAD", None)
    if path := os.environ.pop(PATH_VARIABLE, ""):
        os.environ["PYTHONPATH"] = path
    else:
        os.environ.pop("PYTHONPATH", None)
    sys.executable = os.environ.get(PYTHON_VARIABLE, sys.executable)
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
