"""Whole nodes and servers for tests, started as a user starts them: `shoal up`, `shoal serve`, any free ports."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

SERVE = (sys.executable, "-m", "shoal.cli.main", "serve")
Start = Callable[..., tuple[subprocess.Popen[str], dict[str, Any]]]

READY_S = 120.0
STOP_S = 60.0
NOT_INHERITED = {"SHOAL_GATEWAY", "SHOAL_TOKEN", "SHOAL_CA", "OTEL_EXPORTER_OTLP_ENDPOINT"}
"""Variables of the process of the tests that a node does not get."""
OF_THE_MACHINE = {"event-loop-stalls", "errors-logged", "disk-full", "memory-low", "shared-memory-low", "file-limit"}
"""Findings of `shoal doctor` that the machine of the tests may make on a healthy node."""
IN_PROCESS = 'backend: "python"\nparameters { key: "isolation" value { string_value: "none" } }\n'
"""Configuration of a Python model that runs in the process of its infer instance, and takes it down when it dies."""


def python_model(folder: Path, source: str) -> Path:
    """Write a Python model of the configuration IN_PROCESS as the new folder `folder`, and return the folder."""
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(source)
    (folder / "config.pbtxt").write_text(IN_PROCESS)
    return folder


class Node:
    """A running `shoal up`. What it prints is in `output`; its processes log to `data_dir/logs`."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        env: dict[str, str] | None = None,
        data_dir: Path | None = None,
        piped: bool = False,
    ) -> None:
        self.data_dir = data_dir or folder / "data"
        self.ready_file = folder / "ready.json"
        self.output = folder / "up.log"
        runtime = folder / "runtime"
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of its own, so that a node that the user runs and the nodes of other tests are not found instead.
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        own = {"XDG_RUNTIME_DIR": str(runtime), "XDG_CONFIG_HOME": str(folder / "config")}
        self.environ = {**inherited, **own, **(env or {})}
        command = [sys.executable, "-m", "shoal.cli.main", "up", "--data-dir", str(self.data_dir)]
        command += [] if "--listen" in args else ["--gateway-port", "0"]
        command += ["--admin-port", "0", "--ready-file", str(self.ready_file), *args]
        with self.output.open("ab") as out:
            where = subprocess.PIPE if piped else out
            self.process = subprocess.Popen(command, stdout=where, stderr=subprocess.STDOUT, env=self.environ)

    def wait_until_ready(self, within_s: float = READY_S) -> Node:
        deadline = time.monotonic() + within_s
        while not self.ready_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the node did not become ready (exit {self.process.poll()}):\n{self.story()}")
            time.sleep(0.05)
        return self

    def document(self) -> dict[str, Any]:
        """The ready file, as it is now."""
        document: dict[str, Any] = json.loads(self.ready_file.read_text())
        return document

    @property
    def gateway(self) -> str:
        return str(self.document()["gateway"])

    @property
    def admin(self) -> str:
        return str(self.document()["admin"])

    def pids(self) -> dict[str, int]:
        """Each process of the node by name, as they are now: a restarted one has a new pid."""
        return dict(self.document()["pids"])

    def etcd_address(self) -> str:
        """The address of the node's etcd: a socket in the folder in which it runs."""
        folder = Path(f"/proc/{self.pids()['etcd']}/cwd").readlink()
        return f"unix:{folder}/etcd:0"

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signals the process `name` (`infer-0`, `envoy` ...); returns the pid that it had."""
        pid = self.pids()[name]
        os.kill(pid, number)
        return pid

    def wait_until_restarted(self, name: str, old: int, within_s: float = 60.0) -> int:
        """Waits until `name` has another pid than `old`; returns it. It may still be starting then."""
        deadline = time.monotonic() + within_s
        while (pid := self.pids().get(name, old)) == old:
            assert time.monotonic() < deadline, f"{name} was not restarted:\n{self.story()}"
            time.sleep(0.02)
        return pid

    def shoal(
        self, *args: str, timeout_s: float = 120.0, check: bool = True, elsewhere: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs another `shoal` command, which finds this node by itself.

        With an empty folder `elsewhere`, it runs as on another machine: it is told the gateway, and finds no files.
        """
        environ = self.environ
        if elsewhere is not None:
            args = (*args, "--gateway", self.gateway)
            environ = environ | {"XDG_RUNTIME_DIR": str(elsewhere), "XDG_CONFIG_HOME": str(elsewhere)}
        done = fork_server.run(*args, env=environ, timeout_s=timeout_s)
        assert not check or done.returncode == 0, f"shoal {' '.join(args)}: {done.stdout}{done.stderr}\n{self.story()}"
        return done

    def typed(self, line: str) -> str:
        """Runs a command line of `shoal` as a user types it; returns what it prints."""
        program, *args = shlex.split(line)
        assert program == "shoal", line
        return self.shoal(*args).stdout

    def stop(self, number: int = signal.SIGTERM, within_s: float = STOP_S) -> int:
        """Stops the node in order; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(within_s)

    def story(self) -> str:
        """What the node said, and the end of each log: for the message of a test that fails."""
        logs = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.data_dir.glob("logs/*.log")
        ]
        return "\n".join([self.output.read_text(errors="replace")[-4000:], *logs])

    def close(self) -> None:
        """Nothing is left of it, whatever the test did."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


NodeFactory = Callable[..., Node]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeFactory]:
    """Starts nodes: `running = node("--replicas", "infer=2")` returns when all is ready.

    `env={...}` adds to the environment, `data_dir=PATH` starts on data that is there, `wait=False` returns at once,
    `piped=True` gives what it prints to `process.stdout` instead of the file `output`.
    """
    nodes: list[Node] = []

    def start(*args: str, wait: bool = True, **options: Any) -> Node:
        nodes.append(Node(tmp_path_factory.mktemp("node"), *args, **options))
        return nodes[-1].wait_until_ready() if wait else nodes[-1]

    yield start
    for one in reversed(nodes):
        one.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `shoal serve ... --json` and returns it with what it printed."""
    processes: list[subprocess.Popen[str]] = []

    def run(*args: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = subprocess.Popen([*SERVE, *args, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait()} after {text!r}"
            text += line
        return process, json.loads(text)

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
