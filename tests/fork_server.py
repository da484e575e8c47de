"""Fork servers of the programs that tests start: one has imported their modules, and each start is a fork.

    worker ──module, arguments, environment, files──> fork server ──fork──> the module runs as `__main__`
           <──pid, later the exit status──────────────┘

`python -m services.ingest` uses more than a second of processor time for imports, a command of `shoal` most of one, and
tests start hundreds of each. The processes are real ones: they are signalled, killed and frozen like any other. Nodes
(tests/node) start each service with exec, as an operator does; tests/cli and tests/packaging start commands so.
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
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

COMMANDS = "shoal.cli.main"
PRELOADED = {
    **{f"services.{name}": (f"services.{name}.app",) for name in ("coord", "ingest", "store")},
    COMMANDS: ("shoal.client", "shoal.access.policy", "shoal.cli.models", "shoal.cli.diagnosis.bundle"),
}
"""Modules that are imported before the fork, by the module to run; none of a service whose memory a test measures."""
_PASSED = ("SHOAL_", "AWS_", "PYTEST_", "XDG_")
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
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
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


def start(argv: Sequence[str], log: Path, env: Mapping[str, str], errors: Path | None = None) -> Forked | None:
    """Start `python -m MODULE [ARGUMENT...]` with its output appended to `log`; None when it must be started with exec.

    With `errors`, what it writes to its standard error is appended to that file instead.
    """
    if list(argv[:2]) != [sys.executable, "-m"] or argv[2] not in PRELOADED:
        return None
    server = _server(argv[2].partition(".")[0])
    changed = {name for name in {*env, *server.environ} if env.get(name) != server.environ.get(name)}
    if os.getcwd() != server.folder or not all(name.startswith(_PASSED) for name in changed):
        return None
    request = {"module": argv[2], "arguments": argv[3:], "env": dict(env), "files": [str(log), str(errors or log)]}
    return Forked(server, server.ask(request))


def run(*args: str, env: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `shoal ARGUMENT...` to its end, with its output captured; raise TimeoutExpired as subprocess.run does."""
    argv = [sys.executable, "-m", COMMANDS, *args]
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        process = start(argv, out, env, errors)
        if process is None:
            return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        return subprocess.CompletedProcess(argv, status, out.read_text(), errors.read_text())


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
def _server(package: str) -> _Server:
    """Return this process' server of a package's modules, which ends with this process."""
    return _Server()


def _serve(connection: socket.socket) -> str | None:
    """Answer requests until the other end closes. Return the module to run, in each fork."""
    pipe = connection.makefile("rw")
    for line in pipe:
        request = json.loads(line)
        if "ended" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["ended"], 0)[1])
        else:
            for module in PRELOADED[request["module"]]:
                import_module(module)
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
    for descriptor, path in enumerate(request["files"], 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["module"], *request["arguments"]]


if __name__ == "__main__":
    module = _serve(socket.socket(fileno=int(sys.argv[1])))
    if module is not None:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
