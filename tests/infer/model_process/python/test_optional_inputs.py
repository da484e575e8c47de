"""An input that a Python model may do without: `optional` of its configuration."""

from __future__ import annotations

import asyncio

import pytest

from tests.infer.conftest import floats, output, request

MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "b")
            y = x + (100 if b is None else b.as_numpy())
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y.astype(np.float32))]))
        return responses
"""

CONFIG = """
backend: "python"
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_FP32 dims: [4] },
  { name: "b" data_type: TYPE_FP32 dims: [4] optional: true }
]
output [{ name: "y" data_type: TYPE_FP32 dims: [4] }]
"""


async def test_it_may_be_left_out(repo, serve):
    repo.python("m", MODEL, CONFIG)
    serving = await serve()
    x, b = floats([1, 2, 3, 4]), floats([5, 5, 5, 5])
    without, with_ = request("m", x=x), request("m", x=x, b=b)
    responses = await asyncio.gather(*(serving.stub.ModelInfer(without if n % 2 else with_) for n in range(20)))
    for n, response in enumerate(responses):
        assert output(response, "y").tolist() == (x + (100 if n % 2 else 5)).tolist()
    with pytest.raises(Exception, match="missing 'x'"):
        await serving.stub.ModelInfer(request("m", b=b))
