"""Coord replicas as real processes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from mesh.rpc.channel import connect
from shoal.coord.v1 import coord_pb2_grpc
from shoal.node.probes import health
from tests.breakable import EtcdProcess, Process, until


class Coord(Process):
    """One coord replica."""

    def __init__(self, run_dir: Path, number: int, etcd: str, **settings: str) -> None:
        self.name = f"local/coord-{number}"
        self.etcd = etcd
        self.socket = run_dir / f"coord-{number}.sock"
        told = {"INSTANCE": f"coord-{number}", "LISTEN": f"unix:{self.socket}", "ETCD": etcd, "NOTICE_MS": "0"}
        env = {f"SHOAL_COORD_{key}": value for key, value in (told | settings).items()}
        super().__init__([sys.executable, "-m", "services.coord"], run_dir / f"coord-{number}.log", env)

    async def until_ready(self) -> None:
        await until(lambda: health(f"unix:{self.socket}"), f"{self.name} ready")


@pytest.fixture
async def own_etcd(tmp_path: Path) -> AsyncIterator[EtcdProcess]:
    with EtcdProcess(tmp_path) as process:
        await process.until_ready()
        yield process


@pytest.fixture
async def coord(run_dir: Path, own_etcd: EtcdProcess) -> AsyncIterator[Callable]:
    """Makes coord replicas, started; and ends them."""
    with ExitStack() as stack:

        def start(number: int = 0, **settings: str) -> Coord:
            return stack.enter_context(Coord(run_dir, number, own_etcd.address, **settings))

        yield start


@pytest.fixture
async def stub_of() -> AsyncIterator[Callable]:
    """A stub of coord at an address (`unix:...`) or of a replica."""
    async with AsyncExitStack() as stack:

        async def connected(to: Coord | str) -> coord_pb2_grpc.CoordServiceStub:
            address = to if isinstance(to, str) else f"unix:{to.socket}"
            return coord_pb2_grpc.CoordServiceStub(await stack.enter_async_context(connect(address)))

        yield connected
