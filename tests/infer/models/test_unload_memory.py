"""Unloading gives the memory back: measured on a process that serves a model of 160 MB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, request
from tests.infer.test_infer_process import Infer, serves

_ROWS, _WIDTH = 2500, 16_000
_MEGABYTES = _ROWS * _WIDTH * 4 / 1e6


def heavy() -> onnx.ModelProto:
    """y[n, 2500] = x[n, 16000] times a matrix that cannot be made smaller."""
    matrix = np.random.default_rng(0).random((_WIDTH, _ROWS), np.float32)
    return onnx_files.model(
        [helper.make_node("MatMul", ["x", "matrix"], ["y"])],
        [("x", TensorProto.FLOAT, ("n", _WIDTH))],
        [("y", TensorProto.FLOAT, ("n", _ROWS))],
        [numpy_helper.from_array(matrix, "matrix")],
    )


def resident_mb(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


async def test_most_of_it_comes_back(python, models_folder: Repository, tmp_path: Path):
    models_folder.put("heavy", heavy())
    models_folder.put("light", onnx_files.scale())
    settings = {"model_control": "explicit", "load_models": "light"}
    with Infer(python, tmp_path / "log", repository=str(models_folder.root), **settings) as infer:
        async with connect(infer.address) as channel:
            await until(lambda: serves(channel), "infer serving")
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            before = resident_mb(infer.pid)
            for _ in range(3):
                await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="heavy"))
                await stub.ModelInfer(request("heavy", x=np.ones((4, _WIDTH), np.float32)))
                assert resident_mb(infer.pid) > before + 0.9 * _MEGABYTES
                await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="heavy"))
                assert resident_mb(infer.pid) < before + 0.25 * _MEGABYTES
