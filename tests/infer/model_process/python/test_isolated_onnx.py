"""ONNX models in processes of their own do what those in the server's process do."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from services.infer.loading import model_config
from services.infer.model_process.python_runtime import per_process_options
from services.infer.runtimes.onnx_devices import CUDA, OPENVINO, TENSORRT, resolve_devices
from services.infer.runtimes.onnx_settings import session_options
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conftest import floats, output, request
from tests.infer.loading.test_canary import OPTIONAL, with_default
from tests.infer.runtimes.test_reshape import BATCHED, sums

APART = 'parameters { key: "isolation" value { string_value: "%s" } }'


@pytest.fixture(params=["process", "shared"])
def isolation(request) -> str:
    return request.param


async def test_shapes_are_those_of_the_configuration(repo, serve, isolation):
    repo.put("m", sums(), config=BATCHED + APART % isolation)
    served = await serve()
    metadata = await served.stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
    assert [list(t.shape) for t in (*metadata.inputs, *metadata.outputs)] == [[-1, 4], [-1, 1], [-1, 4]]
    x = floats([1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 1])
    response = await served.stub.ModelInfer(request("m", x=x))
    np.testing.assert_array_equal(output(response, "s"), x.sum(1, keepdims=True))
    np.testing.assert_array_equal(output(response, "f"), x)


async def test_a_reshape_that_contradicts_the_model_is_named(repo, serve, isolation):
    repo.put("m", sums(), config=BATCHED.replace("[2, 2]", "[4, 1]") + APART % isolation)
    served = await serve()
    (row,) = served.models.index()
    assert "input 'x': reshape says [4,1] after the batch dimension, the model [-1,2,2]" in row.reason


async def test_an_input_may_be_left_out(repo, serve, isolation):
    repo.put("m", with_default(), config=OPTIONAL + APART % isolation)
    repo.put("none", with_default(), config=APART % isolation)
    repo.put(
        "not",
        sums(),
        config='input [{ name: "x" data_type: TYPE_FP32 dims: [2, 2] optional: true }] max_batch_size: 4 '
        + APART % isolation,
    )
    served = await serve()
    x, b = floats([1, 2, 3, 4]), floats([5, 5, 5, 5])
    assert output(await served.stub.ModelInfer(request("m", x=x)), "y").tolist() == (x + 10).tolist()
    assert output(await served.stub.ModelInfer(request("m", x=x, b=b)), "y").tolist() == (x + 5).tolist()
    assert output(await served.stub.ModelInfer(request("none", x=x)), "y").tolist() == (x + 10).tolist()
    with pytest.raises(grpc.aio.AioRpcError, match="missing 'x'"):
        await served.stub.ModelInfer(request("m", b=b))
    (row,) = [row for row in served.models.index() if row.name == "not"]
    assert "input 'x' is optional in the configuration, and the model needs it" in row.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("gpu", 0, (), ()), ("gpu", 1, (), ())]),
        ("instance_group [{ count: 2 kind: KIND_CPU }]", 2 * [("cpu", None, (), ())]),
        (
            "instance_group [{ kind: KIND_GPU count: 2 }, { kind: KIND_CPU }]",
            [*2 * [("gpu", 0, (), ())], *2 * [("gpu", 1, (), ())], ("cpu", None, (), ())],
        ),
        (
            "instance_group [{ kind: KIND_GPU gpus: [1] }, { kind: KIND_CPU }] optimization { execution_accelerators { "
            'gpu_execution_accelerator [{ name: "tensorrt" }] cpu_execution_accelerator [{ name: "openvino" }] } }',
            [("gpu", 1, ("tensorrt", "cuda"), ()), ("cpu", None, (), ("openvino",))],
        ),
    ],
)
def test_each_process_has_one_device(text, expected):
    options = session_options(model_config.parse(text), 1)
    everything = (CUDA, TENSORRT, OPENVINO)
    alone = per_process_options(options, resolve_devices(options, everything, lambda: 2))
    assert [
        (place.kind, place.gpu, tuple(p.name for p in each.gpu_providers), tuple(p.name for p in each.cpu_providers))
        for each in alone
        for place in each.placements
    ] == expected
    # The process itself, which sees the same devices, finds that one place again, with nothing that does not suit it.
    assert [[(device.gpu, n) for device, n in resolve_devices(each, everything, lambda: 2)] for each in alone] == [
        [(gpu, 1)] for _, gpu, _, _ in expected
    ]
