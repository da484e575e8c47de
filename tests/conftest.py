"""Real parts for the tests: one etcd and one mongod for the whole run, a fresh database and folder for each test."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.node import parts

READY_S = 30


@contextmanager
def running(part: parts.Part, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `part` until the block ends. It is there, and ready, when the block begins."""
    with log.open("wb") as out:
        process = subprocess.Popen(part.argv, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **part.env})
    try:
        deadline = time.monotonic() + READY_S
        while not asyncio.run(part.ready()):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{part.name} did not become ready (exit {process.poll()}):\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def mongo_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real mongod, the one member of replica set rs0."""
    folder = tmp_path_factory.mktemp("mongod")
    port = parts.free_port()
    with running(parts.mongod(folder, port), folder.parent / "mongod.log"):
        yield f"mongodb://127.0.0.1:{port}/?directConnection=true"


@pytest.fixture
def mongo_database() -> str:
    """The name of a database that no other test uses."""
    return f"test_{uuid.uuid4().hex[:16]}"


@pytest.fixture(scope="session")
def etcd_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real etcd of one member, `127.0.0.1:port`."""
    folder = tmp_path_factory.mktemp("etcd")
    port = parts.free_port()
    with running(parts.etcd(folder, port, parts.free_port()), folder.parent / "etcd.log"):
        yield f"127.0.0.1:{port}"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short path, for unix sockets (their paths end at 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of the environment under test."""
    return sys.executable
