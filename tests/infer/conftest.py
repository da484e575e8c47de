"""The inference server as it runs, in this process, on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest

from mesh.rpc.access import Access
from mesh.rpc.channel import connect
from mesh.rpc.server import Server
from services.infer.core import InferenceServer
from services.infer.models.control import Control
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.operators.kernels_runtime import KernelsRuntime
from services.infer.rest.app import InferRestApp
from services.infer.rpc import bulk_rpc, fast_methods, inference_rpc
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.runtime import Runtime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sequences.sequence_table import STATE_BYTES
from services.infer.sources.repository import look, scan
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc


class Repository:
    """A folder of models that a test fills."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def bare(self, name: str, model: onnx.ModelProto) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        onnx.save(model, self.root / f"{name}.onnx")

    def put(self, name: str, model: onnx.ModelProto | bytes, *, version: int = 1, config: str | None = None) -> Path:
        folder = self.root / name
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        data = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / str(version) / "model.onnx").write_bytes(data)
        if config is not None:
            (folder / "config.pbtxt").write_text(config)
        return folder


@dataclass(frozen=True)
class Serving:
    """A running server and a stub for it."""

    models: Models
    core: InferenceServer
    stub: inference_pb2_grpc.GRPCInferenceServiceAsyncStub
    channel: grpc.aio.Channel
    server: Server | None = None
    """The Server; None where a test has another front."""


@pytest.fixture
def models_folder(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


@pytest.fixture
async def serve(run_dir: Path) -> AsyncIterator[Callable[..., object]]:
    """`await serve(root)` serves a repository until the test ends."""
    async with AsyncExitStack() as stack:

        async def start(root: Path, *, state_bytes: int = STATE_BYTES, **limits: int) -> Serving:
            root.mkdir(exist_ok=True)
            return await stack.enter_async_context(
                serving(root, run_dir / "infer.sock", QueueLimits(**limits), state_bytes=state_bytes)
            )

        yield start


@asynccontextmanager
async def serving(
    root: Path,
    socket: Path,
    limits: QueueLimits,
    runtime: Runtime | Runtimes | None = None,
    access: Access | None = None,
    state_bytes: int = STATE_BYTES,
) -> AsyncIterator[Serving]:
    """Serve a repository; with `access` also on the fast path, as a process does."""
    context = LoadContext.of(runtime or Runtimes([OnnxRuntime(), KernelsRuntime()]), limits, state_bytes=state_bytes)
    async with Models(context) as models, Control(models, partial(look, root)) as control:
        core = InferenceServer(models, "test/infer-0", control=control)
        fast = fast_methods(core, access) if access is not None else {}
        rpcs = [inference_rpc(core, access), bulk_rpc(core, access)]
        server = Server(
            f"unix:{socket}",
            rpcs,
            drain_ms=2000,
            fast_methods=fast,
            access=access,
            http=partial(InferRestApp, core),
            heavy=core.heavy,
        )
        async with server:
            control.offer(scan(root))
            await models.settled()
            async with connect(f"unix:{socket}") as channel:
                yield Serving(models, core, inference_pb2_grpc.GRPCInferenceServiceStub(channel), channel, server)


def request(model: str, /, *, version: str = "", id: str = "", **arrays: np.ndarray) -> pb.ModelInferRequest:
    """A request with raw inputs, as tritonclient makes them."""
    names = {"f4": "FP32", "f8": "FP64", "i8": "INT64", "i4": "INT32", "f2": "FP16", "b1": "BOOL", "u1": "UINT8"}
    made = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, array in arrays.items():
        if array.dtype == object:
            made.inputs.add(name=name, datatype="BYTES", shape=array.shape)
            parts = (len(e).to_bytes(4, "little") + e for e in array.reshape(-1))
            made.raw_input_contents.append(b"".join(parts))
        else:
            made.inputs.add(name=name, datatype=names[array.dtype.str[1:]], shape=array.shape)
            made.raw_input_contents.append(array.tobytes())
    return made


def output(response: pb.ModelInferResponse, name: str) -> np.ndarray:
    """One output as an array; BYTES as objects."""
    types = {"FP32": "f4", "FP64": "f8", "INT64": "i8", "INT32": "i4", "FP16": "f2", "BOOL": "?", "UINT8": "u1"}
    index = [o.name for o in response.outputs].index(name)
    meta, raw = response.outputs[index], response.raw_output_contents[index]
    if meta.datatype != "BYTES":
        return np.frombuffer(raw, types[meta.datatype]).reshape(meta.shape)
    parts, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        parts.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return np.array(parts, object).reshape(meta.shape)


def floats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)
