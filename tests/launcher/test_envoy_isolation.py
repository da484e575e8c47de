"""A burst of calls on one connection to Envoy does not delay the calls of another; bodies keep within the memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.siege.attack import Siege
from bench.siege.catalogue import CATALOGUE
from bench.siege.row import CEILINGS_MIB
from bench.siege.servers import peak_mib
from mesh.rpc.server import Server
from shoal.node import processes
from shoal.node.envoy_edge import bootstrap
from tests.breakable import until
from tests.free_ports import free_port
from tests.mesh.h2.test_turns import CALL, FLOOD, calls, greeting

CALLS = 500
PATIENCE_S = 30.0


@pytest.fixture
async def handled(run_dir: Path) -> AsyncIterator[list[str]]:
    """The methods of the calls that a server at `run_dir/s.sock` has handled, in order."""
    order: list[str] = []

    def handler(name: str) -> Callable[..., None]:
        def handle(body, call) -> None:
            order.append(name)
            call.reply((body[5:],), len(body) - 5)

        return handle

    fast = {path: handler(path) for path in (FLOOD, CALL)}
    async with Server(f"unix:{run_dir}/s.sock", [], drain_ms=500, fast_methods=fast) as server:
        await server.serve()
        yield order


def connected(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@asynccontextmanager
async def envoy(run_dir: Path) -> AsyncIterator[tuple[int, int]]:
    """Run an Envoy with one thread in front of `run_dir/s.sock`; give its pid and port."""
    port, config = free_port(), run_dir / "envoy.json"
    document = bootstrap(host="127.0.0.1", port=port, workers=[f"{run_dir}/s.sock"], admin=f"{run_dir}/a.sock")
    config.write_text(json.dumps(document))
    command = [str(processes.find_binary("envoy")), "--config-path", str(config), "--concurrency", "1"]
    process = subprocess.Popen([*command, "--disable-hot-restart", "--log-level", "error"])
    try:
        await until(lambda: connected(port), "Envoy listens")
        yield process.pid, port
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.mark.envoy
async def test_a_burst_of_calls_does_not_delay_another_connection(run_dir: Path, handled: list[str]) -> None:
    async with envoy(run_dir) as (pid, port):
        flood, other = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        with flood, other:
            for peer in (flood, other):
                # Both connections are open, and Envoy is connected to the server.
                peer.sendall(greeting() + calls(CALL, 1))
            await until(lambda: len(handled) == 2, "both connections work")
            handled.clear()
            # Envoy finds both at the same time, the burst first.
            os.kill(pid, signal.SIGSTOP)
            flood.sendall(calls(FLOOD, CALLS, first=3))
            other.sendall(calls(CALL, 1, first=3))
            os.kill(pid, signal.SIGCONT)
            await until(lambda: len(handled) > CALLS, "all calls are handled")
    assert handled.index(CALL) < CALLS / 4


@pytest.mark.envoy
async def test_a_flood_of_bodies_keeps_within_the_ceiling(run_dir: Path) -> None:
    def flood(seconds: float) -> None:
        siege = Siege(CATALOGUE["half-bodies"], f"127.0.0.1:{port}")
        siege.begin(time.monotonic() + PATIENCE_S)
        siege.run(time.monotonic() + seconds)

    with socket.socket(socket.AF_UNIX) as silent:
        # The server reads nothing: Envoy keeps the bodies.
        silent.bind(f"{run_dir}/s.sock")
        silent.listen()
        async with envoy(run_dir) as (pid, port):
            # On a busy machine, 2 s may be too short to fill its memory.
            for seconds in (2.0, 4.0, 8.0):
                if peak_mib(pid) <= 300:
                    await asyncio.to_thread(flood, seconds)
            assert 300 < peak_mib(pid) <= CEILINGS_MIB["envoy"]
