"""A model says truly whether its requests take the fast path: what `shoal status` shows is what happens."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import onnx
import pytest

from services.infer.fast_path.infer_fast import FastInfer
from services.infer.requests.request_memory import Uncounted
from tests.infer import onnx_files
from tests.infer.conftest import floats, request

CACHED = """max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [4] } output { name: "y" data_type: TYPE_FP32 dims: [4] }
response_cache { enable: true }"""
PREFERRED = """max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [4] } output { name: "y" data_type: TYPE_FP32 dims: [4] }
dynamic_batching { preferred_batch_size: [4] priority_levels: 2 default_priority_level: 1 }
instance_group { count: 2 }"""
ENSEMBLE = """platform: "ensemble" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [4] } output { name: "y" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling { step { model_name: "plain" model_version: -1
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }"""

CASES = {
    "plain": "",
    "batched": "",
    "ensemble": "",
    "cached": "it has a response cache",
    "texts": "input x is BYTES",
    "flags": "input x is BOOL",
}


class Caller(Uncounted):
    """Takes the outcome of one call."""

    def __init__(self) -> None:
        self.deadline = float("inf")
        self.on_end: Any = None
        self.is_over = False
        self.headers: dict[bytes, bytes] = {}
        self.span = None
        self.responded = asyncio.Event()

    def reply(self, parts: Any, size: int) -> None:
        self.is_over = True
        self.responded.set()

    def reply_slow(self, parts: Any, size: int, seconds: float, about: object) -> None:
        self.reply(parts, size)

    def refuse(self, error: BaseException, seconds: float = 0.0, about: object = None) -> None:
        raise error


ARRAYS = {
    "texts": np.array([[b"a"] * 4], object),
    "flags": np.ones((1, 4), bool),
}


@pytest.mark.parametrize("model", CASES)
async def test_the_path_of_a_model_is_the_one_that_it_names(serve: Any, models_folder: Any, model: str) -> None:
    models_folder.put("plain", onnx_files.scale())
    models_folder.put("batched", onnx_files.scale(), config=PREFERRED)
    models_folder.put("cached", onnx_files.scale(), config=CACHED)
    models_folder.put("texts", onnx_files.identity(onnx.TensorProto.STRING))
    models_folder.put("flags", onnx_files.identity(onnx.TensorProto.BOOL))
    (models_folder.root / "ensemble" / "1").mkdir(parents=True)
    (models_folder.root / "ensemble" / "config.pbtxt").write_text(ENSEMBLE)
    serving = await serve(models_folder.root)

    assert serving.models.find(model, "").slow_path_reason == CASES[model]
    assert {name: reason for name, _, _, reason in serving.models.ready_set.value}[model] == CASES[model]
    fast = FastInfer(serving.core, serving.models)
    body = bytes(5) + request(model, x=ARRAYS.get(model, floats([1, 2, 3, 4]))).SerializeToString()
    for _ in range(2):
        caller = Caller()
        fast(body, caller)
        await asyncio.wait_for(caller.responded.wait(), 30)
    assert bool(fast._by_name) == (not CASES[model])
