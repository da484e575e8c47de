"""`reshape` of a configuration: other shapes for clients than for the model."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.infer.loading import model_config
from services.infer.runtimes import reshape
from services.infer.runtimes.reshape import Reshape
from services.infer.runtimes.runtime import ModelFailed
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request


@pytest.mark.parametrize(
    ("given", "made", "skip", "shape", "expected"),
    [
        ((4,), (2, 2), 0, (4,), (2, 2)),
        ((4,), (2, 2), 1, (3, 4), (3, 2, 2)),
        ((1,), (), 0, (1,), ()),
        ((1,), (), 1, (5, 1), (5,)),
        ((), (1,), 1, (5,), (5, 1)),
        ((-1, 4), (-1, 2, 2), 0, (7, 4), (7, 2, 2)),
        ((-1, 4, -1), (2, -1, 2, -1), 1, (3, 5, 4, 6), (3, 2, 5, 2, 6)),
        ((-1,), (1, -1), 1, (3, 0), (3, 1, 0)),
    ],
)
def test_shapes(given, made, skip, shape, expected):
    array = np.arange(np.prod(shape)).reshape(shape)
    got = Reshape(given, made, skip)("x", array)
    assert got.shape == expected
    np.testing.assert_array_equal(got.reshape(-1), array.reshape(-1))


def test_an_array_of_another_shape_is_an_error_of_the_model():
    with pytest.raises(ModelFailed, match=r"'x' has shape \[3\]"):
        Reshape((4,), (2, 2), 0)("x", np.zeros(3))


@pytest.mark.parametrize(
    ("dims", "shape", "named"),
    [
        ([4], [5], "same number of elements"),
        ([-1, 4], [4, -1], "same number of elements"),
        ([-1], [1], "as many -1"),
        ([4], [-4], "1 or more"),
        ([], [2], "same number"),
    ],
)
def test_an_invalid_value_is_named(dims, shape, named):
    tensor = model_config.parse(f'input {{ name: "x" dims: {dims} reshape {{ shape: {shape} }} }}').input[0]
    (wrong,) = reshape.reshape_errors("input", tensor)
    assert named in wrong


def sums():
    """s[n] = the sum of x[n, 2, 2]; f[n, 4] = x, flat."""
    return onnx_files.model(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("ReduceSum", ["f", "axis"], ["s"], keepdims=0)],
        [("x", TensorProto.FLOAT, ("n", 2, 2))],
        [("s", TensorProto.FLOAT, ("n",)), ("f", TensorProto.FLOAT, ("n", 4))],
        [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )


BATCHED = """
max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [4] reshape { shape: [2, 2] } }]
output [
  { name: "s" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } },
  { name: "f" data_type: TYPE_FP32 dims: [4] }
]
"""


async def test_a_batched_model(serve, models_folder: Repository):
    models_folder.put("m", sums(), config=BATCHED)
    served = await serve(models_folder.root)
    metadata = await served.stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
    assert [list(t.shape) for t in (*metadata.inputs, *metadata.outputs)] == [[-1, 4], [-1, 1], [-1, 4]]
    config = (await served.stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config
    assert list(config.input[0].reshape.shape) == [2, 2]
    x = floats([1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 1])
    response = await served.stub.ModelInfer(request("m", x=x))
    np.testing.assert_array_equal(output(response, "s"), x.sum(1, keepdims=True))
    np.testing.assert_array_equal(output(response, "f"), x)
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await served.stub.ModelInfer(request("m", x=x.reshape(3, 2, 2)))
    assert err.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_scalars_of_a_model_without_a_batch(serve, models_folder: Repository):
    scalar = onnx_files.scale(3, dims=())
    config = """
    input [{ name: "x" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }]
    output [{ name: "y" data_type: TYPE_FP32 dims: [1, 1] reshape { shape: [] } }]
    """
    models_folder.put("m", scalar, config=config)
    served = await serve(models_folder.root)
    response = await served.stub.ModelInfer(request("m", x=np.array([5], np.float32)))
    assert output(response, "y").tolist() == [[15.0]]


async def test_a_reshape_that_contradicts_the_model_is_rejected(serve, models_folder: Repository):
    models_folder.put("m", sums(), config=BATCHED.replace("[2, 2]", "[4, 1]"))
    served = await serve(models_folder.root)
    (row,) = served.models.index()
    assert "input 'x': reshape says [4,1] after the batch dimension, the model [-1,2,2]" in row.reason
