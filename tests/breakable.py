"""Real processes that a test may kill, freeze and restart, and `until`, which polls for a condition."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from shoal.node import processes
from shoal.node.admin import fetch
from shoal.node.envoy_bootstrap import bootstrap
from shoal.node.envoy_overload import DEFAULT_HEAP_MB
from tests import fork_server
from tests.free_ports import free_port

PATIENCE_S = 60.0
"""Default limit of a wait: longer than any step takes on a busy machine."""


async def until(
    is_so: Callable[[], bool | Awaitable[bool]], what: str = "it", within_s: float = PATIENCE_S, every_s: float = 0.02
) -> None:
    """Wait until `is_so()` returns True; fail the test when that takes longer than `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        answer = is_so()
        if await answer if isinstance(answer, Awaitable) else answer:
            return
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s:.0f} s"
        await asyncio.sleep(every_s)


class Process:
    """One process; leaving its `with` block kills it."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self._argv = [*argv]
        self._env = {**os.environ, **(env or {})}
        self.log = log
        self._popen: subprocess.Popen[bytes] | fork_server.Forked | None = None

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def start(self) -> None:
        """Start the process, also after its end, without waiting until it is ready."""
        assert not self.is_running(), "the first one would be left running"
        self._popen = fork_server.start(self._argv, self.log, self._env)
        if self._popen is None:
            with self.log.open("ab") as out:
                self._popen = subprocess.Popen(self._argv, stdout=out, stderr=subprocess.STDOUT, env=self._env)

    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        assert self._popen is not None
        self._popen.kill()
        self._popen.wait()

    def freeze(self) -> None:
        """Stop the process. A thread that runs on another processor goes on for a moment: wait for all of them."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_frozen():
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.001)

    def _is_frozen(self) -> bool:
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            # A thread may end meanwhile.
            with suppress(FileNotFoundError, ProcessLookupError):
                if stat.read_text().rpartition(")")[2].split()[0] not in ("T", "t", "X", "Z"):
                    return False
        return True

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self, within_s: float = PATIENCE_S) -> int:
        """Send SIGTERM, and return the exit status."""
        assert self._popen is not None
        self._popen.terminate()
        return self._popen.wait(within_s)

    def __enter__(self) -> Process:
        # A fixture may have started the process already: a second one would be left running.
        if not self.is_running():
            self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._popen is not None and self._popen.poll() is None:
            self.thaw()
            self.kill()


class EtcdProcess(Process):
    """An etcd for one test."""

    def __init__(self, folder: Path) -> None:
        self.address, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self._spec = processes.etcd(folder / "etcd", self.address, peer)
        super().__init__(self._spec.argv, folder / "etcd.log", self._spec.env)

    async def until_ready(self) -> None:
        await until(self._spec.ready, "etcd ready")


class EnvoyProcess(Process):
    """An Envoy for one test, started with the launcher's command."""

    def __init__(
        self,
        folder: Path,
        coords: Sequence[Path],
        node: str = "local",
        concurrency: int = 1,
        heap: int = DEFAULT_HEAP_MB << 20,
    ) -> None:
        self.gateway = f"127.0.0.1:{free_port()}"
        self.admin = folder / "envoy-admin.sock"
        self.outbound = folder / "outbound.sock"
        config = folder / "envoy.json"
        sockets = [str(path) for path in coords]
        config.write_text(
            bootstrap(
                node=node,
                gateway=self.gateway,
                outbound=str(self.outbound),
                admin=str(self.admin),
                coords=sockets,
                heap=heap,
            )
        )
        self._spec = processes.envoy(config, f"unix:{self.admin}", concurrency)
        super().__init__(self._spec.argv, folder / "envoy.log", self._spec.env)

    async def until_ready(self) -> None:
        await until(self._spec.ready, "Envoy ready")

    async def admin_get(self, path: str) -> str:
        """Return a response of the admin endpoint."""
        return (await fetch(self.admin, path, "", PATIENCE_S)).body.decode()

    async def stats(self, pattern: str = "") -> dict[str, int]:
        """Return counters and gauges by name."""
        lines = (await self.admin_get(f"/stats?filter={pattern}")).splitlines()
        pairs = (line.rpartition(": ") for line in lines)
        return {name: int(value) for name, _, value in pairs if value.isdecimal()}
