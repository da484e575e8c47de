"""A server with every runtime, over a folder of models that the test writes."""

from __future__ import annotations

import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from mesh.rpc.channel import connect
from mesh.rpc.server import Server
from services.infer.core import InferenceServer
from services.infer.model_process.inner_calls import InnerCalls
from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.rpc import inference_rpc
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources import repository
from shoal.inference.v2 import inference_pb2_grpc
from tests.infer.conftest import Repository, Serving


class PythonRepository(Repository):
    """A folder of models, of Python ones mostly."""

    def python(self, name: str, source: str, config: str = "", *, version: int = 1, file: str = "model.py") -> Path:
        folder = self.root / name
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        (folder / str(version) / file).write_text(textwrap.dedent(source))
        if config:
            (folder / "config.pbtxt").write_text(config)
        return folder


@pytest.fixture
def repo(tmp_path: Path) -> PythonRepository:
    return PythonRepository(tmp_path / "models")


@pytest.fixture
def isolation() -> str:
    """Where Python models run that do not say."""
    return "process"


@pytest.fixture
async def serve(repo: PythonRepository, isolation: str, tmp_path_factory):
    """Serves the folder as it is then."""
    run_dir = tmp_path_factory.mktemp("run")
    async with AsyncExitStack() as stack:

        async def start(**limits) -> Serving:
            repo.root.mkdir(exist_ok=True)
            served = serving(repo.root, run_dir / "infer.sock", QueueLimits(**limits), isolation)
            return await stack.enter_async_context(served)

        yield start


@asynccontextmanager
async def serving(root: Path, socket: Path, limits: QueueLimits, isolation: str = "process") -> AsyncIterator[Serving]:
    calls = InnerCalls()
    runtimes = Runtimes([OnnxRuntime(), PythonRuntime(call=calls, isolation=isolation)], IsolatedOnnxRuntime())
    async with Models(LoadContext.of(runtimes, limits)) as models:
        core = InferenceServer(models, "test/infer-0")
        calls.bind(core)
        async with Server(f"unix:{socket}", [inference_rpc(core)], drain_ms=2000):
            models.want(repository.scan(root))
            await models.settled()
            async with connect(f"unix:{socket}") as channel:
                yield Serving(models, core, inference_pb2_grpc.GRPCInferenceServiceStub(channel), channel)
