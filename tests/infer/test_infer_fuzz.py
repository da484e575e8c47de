"""Requests that nobody should send: each is answered, or refused with a status that says why, and nothing dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from services.infer import repository
from services.infer.core import InferenceServer
from services.infer.models import Models
from services.infer.onnx_runtime import OnnxRuntime
from services.infer.queue import QueueLimits
from services.infer.version import Means
from shoal.errors import Code, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

EXPECTED = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED}
RAISING = {"lookup", "reshape"}
"""Models that raise for some values: only they may answer INTERNAL, and only with what they said."""


class Bench:
    """A server in an event loop that lives as long as the module's tests."""

    def __init__(self, runner: asyncio.Runner, core: InferenceServer) -> None:
        self.runner = runner
        self.core = core

    def infer(self, asked: pb.ModelInferRequest) -> pb.ModelInferResponse | ShoalError:
        async def call() -> pb.ModelInferResponse | ShoalError:
            try:
                return await self.core.infer(asked)
            except ShoalError as err:
                return err

        return self.runner.run(call())

    def check(self, asked: pb.ModelInferRequest) -> None:
        got = self.infer(asked)
        if isinstance(got, ShoalError):
            assert got.code in EXPECTED or (
                asked.model_name in RAISING
                and got.code is Code.INTERNAL
                and got.message.startswith("Failed to process the request(s) for model")
            ), got.message
            assert got.message
            assert len(got.message) < 4000
        else:
            assert len(got.outputs) == len(got.raw_output_contents)
            assert got.SerializeToString()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = Repository(tmp_path_factory.mktemp("fuzz") / "models")
    folder.bare("double", onnx_files.scale())
    folder.bare("add", onnx_files.add())
    folder.bare("lookup", onnx_files.lookup())
    folder.bare("reshape", onnx_files.reshaping())
    folder.bare("text", onnx_files.identity(TensorProto.STRING, ("n", "k")))
    folder.bare("half", onnx_files.identity(TensorProto.FLOAT16, ("n", "k", "l")))
    folder.bare("flags", onnx_files.identity(TensorProto.BOOL, ("n", "k")))
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> InferenceServer:
            models = await stack.enter_async_context(Models(Means.of(OnnxRuntime(), QueueLimits())))
            models.want(repository.scan(folder.root))
            await models.settled()
            assert models.is_ready()
            return InferenceServer(models, "r")

        bench = Bench(runner, runner.run(start()))
        yield bench
        # After all of that it still computes.
        assert output(bench.infer(request("double", x=floats([1, 2, 3, 4]))), "y").tolist() == [[2, 4, 6, 8]]
        runner.run(stack.aclose())


names = st.sampled_from(["x", "a", "b", "i", "shape", "y", "sum", "zz", ""]) | st.text(max_size=5)
datatypes = st.sampled_from(["FP32", "FP16", "INT64", "BYTES", "BOOL", "BF16", "UINT8", "fp32", ""])
dims = st.lists(st.integers(0, 4) | st.sampled_from([-1, 65, 2**31, 2**62, 2**63 - 1]), max_size=4)
values = st.one_of(
    st.builds(lambda v: pb.InferParameter(bool_param=v), st.booleans()),
    st.builds(lambda v: pb.InferParameter(int64_param=v), st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda v: pb.InferParameter(uint64_param=v), st.integers(0, 2**64 - 1)),
    st.builds(lambda v: pb.InferParameter(string_param=v), st.text(max_size=4)),
    st.builds(lambda v: pb.InferParameter(double_param=v), st.floats()),
    st.just(pb.InferParameter()),
)
parameters = st.dictionaries(
    st.sampled_from(["priority", "sequence_id", "explain", "triton_x", "classification", "mine", "binary_data"])
    | st.text(max_size=4),
    values,
    max_size=2,
)
contents = st.builds(
    pb.InferTensorContents,
    fp32_contents=st.lists(st.floats(width=32), max_size=4),
    int64_contents=st.lists(st.integers(-5, 2**63 - 1), max_size=2),
    bytes_contents=st.lists(st.binary(max_size=3), max_size=2),
    bool_contents=st.lists(st.booleans(), max_size=1),
)
inputs = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=names,
    datatype=datatypes,
    shape=dims,
    parameters=st.just({}) | parameters,
    contents=st.none() | st.none() | contents,
)
outputs = st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=names, parameters=parameters)
raws = st.binary(max_size=64) | st.sampled_from([bytes(16), bytes(8), bytes(4), b"\1\0\0\0a", b"\xff\xff\xff\xffabc"])
MODELS = ["double", "add", "lookup", "reshape", "text", "half", "flags"]
requests = st.builds(
    pb.ModelInferRequest,
    model_name=st.sampled_from(MODELS) | st.text(max_size=4),
    model_version=st.sampled_from(["", "", "", "1"]) | st.text(max_size=3),
    id=st.text(max_size=3),
    parameters=parameters,
    inputs=st.lists(inputs, max_size=3),
    outputs=st.lists(outputs, max_size=2),
    raw_input_contents=st.lists(raws, max_size=3),
)

many = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(requests)
def test_any_request(bench, asked):
    bench.check(asked)


VALID = [
    request("double", x=floats([1, 2, 3, 4])),
    request("add", a=floats([1, 2]), b=floats([3, 4])),
    request("lookup", i=np.array([[1], [2]])),
    request("reshape", x=np.arange(6, dtype=np.float32), shape=np.array([2, 3])),
    request("text", x=np.array([[b"one", b""], [b"three", b"4"]], object)),
    request("half", x=np.zeros((1, 2, 2), np.float16)),
    request("flags", x=np.array([[True, False]])),
]


@pytest.mark.parametrize("asked", VALID, ids=[v.model_name for v in VALID])
def test_the_requests_that_are_spoiled_below_are_valid(bench, asked):
    assert isinstance(bench.infer(asked), pb.ModelInferResponse)


@many
@given(st.sampled_from(VALID), st.data())
def test_a_valid_request_with_one_thing_wrong(bench, valid, data):
    asked = pb.ModelInferRequest()
    asked.CopyFrom(valid)
    what = data.draw(st.sampled_from(["shape", "raw", "datatype", "name", "contents", "more", "less", "output"]))
    n = data.draw(st.integers(0, len(asked.inputs) - 1))
    match what:
        case "shape":
            asked.inputs[n].shape[:] = data.draw(dims)
        case "raw":
            asked.raw_input_contents[n] = data.draw(raws)
        case "datatype":
            asked.inputs[n].datatype = data.draw(datatypes)
        case "name":
            asked.inputs[n].name = data.draw(names)
        case "contents":
            asked.inputs[n].contents.CopyFrom(data.draw(contents))
        case "more":
            asked.inputs.add().CopyFrom(data.draw(inputs))
            asked.raw_input_contents.append(data.draw(raws))
        case "less":
            del asked.raw_input_contents[n]
        case "output":
            asked.outputs.add().CopyFrom(data.draw(outputs))
    bench.check(asked)


@many
@given(st.sampled_from(VALID), st.data())
def test_a_valid_request_with_bytes_changed_on_its_way(bench, valid, data):
    wire = bytearray(valid.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at] = data.draw(st.integers(0, 255))
    try:
        asked = pb.ModelInferRequest.FromString(bytes(wire))
    except DecodeError:
        return  # The front refuses it.
    bench.check(asked)
