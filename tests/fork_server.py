"""Fork server of the services that tests start: it has imported their modules, and each start is a fork.

    worker ──module, environment, log──> fork server ──fork──> the module runs as `__main__`
           <──pid, later the exit status──┘

`python -m services.ingest` uses more than a second of processor time for imports, and tests start hundreds of services.
The processes are real ones: they are signalled, killed and frozen like any other. Nodes (tests/node) start each service
with exec, as an operator does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

PRELOADED = {f"services.{name}": f"services.{name}.app" for name in ("coord", "ingest", "store")}
"""Module that is imported before the fork, by the module to run. Services whose memory a test measures are not here."""
_PASSED = ("SHOAL_", "AWS_", "PYTEST_")
"""Variables that are read after the imports."""


class Forked:
    """A process that the fork server has started, with the part of subprocess.Popen that tests use."""

    def __init__(self, server: _Server, pid: int) -> None:
        self._server = server
        self.pid = pid
        # The process stays a zombie until its status is asked for, so that no other one gets its pid.
        self._pidfd = os.pidfd_open(pid)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready = select.poll()
            ready.register(self._pidfd, select.POLLIN)
            if not ready.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("a forked service", timeout or 0)
            self.returncode = self._server.ask({"ended": self.pid})
            os.close(self._pidfd)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(argv: Sequence[str], log: Path, env: Mapping[str, str]) -> Forked | None:
    """Start `python -m MODULE` with its output appended to `log`; None when it must be started with exec."""
    if len(argv) != 3 or list(argv[:2]) != [sys.executable, "-m"] or argv[2] not in PRELOADED:
        return None
    server = _server()
    changed = {name for name in {*env, *server.environ} if env.get(name) != server.environ.get(name)}
    if os.getcwd() != server.folder or not all(name.startswith(_PASSED) for name in changed):
        return None
    return Forked(server, server.ask({"module": argv[2], "env": dict(env), "log": str(log)}))


class _Server:
    def __init__(self) -> None:
        self.environ, self.folder = dict(os.environ), os.getcwd()
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())]
            self._popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._pipe = ours.makefile("rw")
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> int:
        with self._lock:
            self._pipe.write(json.dumps(request) + "\n")
            self._pipe.flush()
            answer = self._pipe.readline()
        assert answer, "the fork server has ended"
        return int(answer)


@cache
def _server() -> _Server:
    """Return this process' server, which ends with this process."""
    return _Server()


def _serve(connection: socket.socket) -> str | None:
    """Answer requests until the other end closes. Return the module to run, in each fork."""
    pipe = connection.makefile("rw")
    for line in pipe:
        request = json.loads(line)
        if "ended" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["ended"], 0)[1])
        else:
            import_module(PRELOADED[request["module"]])
            # A collection in a fork would copy every page of the modules.
            gc.collect()
            gc.freeze()
            if not (answer := os.fork()):
                os.close(connection.detach())
                _become(request)
                return str(request["module"])
        pipe.write(f"{answer}\n")
        pipe.flush()
    return None


def _become(request: Mapping[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["module"]]


if __name__ == "__main__":
    module = _serve(socket.socket(fileno=int(sys.argv[1])))
    if module is not None:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
