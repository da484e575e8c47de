"""Shoal in this process, before servers that tests start."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.infer.remote.remote_runtime import RemoteRuntime
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from tests.infer.conftest import Serving, serving
from tests.infer.remote import configs
from tests.infer.remote.scripted import Scripted


class Clock:
    """The real one, which a test may put forward: for what is done once a second."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def environ() -> dict[str, str]:
    """The environment of Shoal's process."""
    return {}


@pytest.fixture
async def front(run_dir: Path, clock: Clock, environ: dict[str, str]) -> AsyncIterator[Callable[..., object]]:
    """`await front(root)` serves a repository with remote models until the test ends."""
    async with AsyncExitStack() as stack:

        async def start(root: Path, **limits: int) -> Serving:
            runtimes = Runtimes([OnnxRuntime(), RemoteRuntime(environ, clock)])
            return await stack.enter_async_context(
                serving(root, run_dir / "front.sock", QueueLimits(**limits), runtimes)
            )

        yield start


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    """A remote server."""
    async with Scripted().serving() as running:
        yield running


@pytest.fixture
async def near(front: Callable[..., object], scripted: Scripted, tmp_path: Path) -> Serving:
    """Shoal with one model, `m`, which is the scripted server's; one batch at a time."""
    configs.put(tmp_path / "models", "m", "instance_group { count: 1 }", url=f"grpc://{scripted.address}")
    return await front(tmp_path / "models")
