"""Requests that nobody should send: each gets a result, or is refused with a status that says why, and nothing dies."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from services.infer.core import InferenceServer
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.requests.request import InferenceRequest
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources import repository
from shoal.errors import Code, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request
from tests.infer.mutation import mutated
from tests.long_form import by_form

EXPECTED = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED}
SEEDS = range(4)
ROUNDS = 1500
RAISING = {"lookup", "reshape", "cached-lookup"}
"""Models that raise for some values: only they may return INTERNAL, and only with what they said."""


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
            assert (
                got.code in EXPECTED
                or (got.code is Code.DEADLINE_EXCEEDED and "timeout" in asked.parameters)
                or (
                    asked.model_name in RAISING
                    and got.code is Code.INTERNAL
                    and got.message.startswith("Failed to process the request(s) for model")
                )
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
    folder.put("cached-lookup", onnx_files.lookup(), config="response_cache { enable: true }")
    folder.put("cached", onnx_files.identity(dims=("n", "k")), config="response_cache { enable: true }")
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> InferenceServer:
            models = await stack.enter_async_context(Models(LoadContext.of(OnnxRuntime(), QueueLimits())))
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
    st.sampled_from(
        ["timeout", "priority", "sequence_id", "explain", "triton_x", "classification", "mine", "binary_data"]
    )
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
MODELS = ["double", "add", "lookup", "reshape", "text", "half", "flags", "cached"]
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

many = settings(max_examples=by_form(100, 400), deadline=None, suppress_health_check=list(HealthCheck))


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
    request("cached", x=floats([1, 2], [3, 4])),
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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_valid_request_spoiled_as_protobuf_can_be(bench, seed):
    rng, corpus = random.Random(seed), [valid.SerializeToString() for valid in VALID]
    for _ in range(ROUNDS):
        wire = mutated(rng, corpus)
        try:
            asked = pb.ModelInferRequest.FromString(wire)
        except DecodeError:
            continue  # The front refuses it.
        bench.check(asked)


X = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
LENGTHS = [b"", b"\0", b"\1\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80abc", b"\2\0\0\0a\0\0\0\0", b"\0" * 9]


def many_parameters() -> pb.ModelInferRequest:
    asked = request("double", x=floats([1, 2, 3, 4]))
    for n in range(1_000):
        asked.parameters[f"p{n}"].double_param = float("nan") if n % 2 else float("inf")
        asked.inputs[0].parameters[f"p{n}"].string_param = "v" * 10
    return asked


LARGE = {
    "10,000 inputs": pb.ModelInferRequest(
        model_name="double", inputs=[X] * 10_000, raw_input_contents=[bytes(16)] * 10_000
    ),
    "10,000 outputs": pb.ModelInferRequest(
        model_name="double",
        inputs=[X],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=f"y{n}") for n in range(10_000)],
        raw_input_contents=[bytes(16)],
    ),
    "10,000 contents": pb.ModelInferRequest(model_name="double", inputs=[X], raw_input_contents=[bytes(16)] * 10_000),
    "10,000 dimensions": pb.ModelInferRequest(
        model_name="double",
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1] * 10_000)],
        raw_input_contents=[bytes(16)],
    ),
    "dimensions whose product is beyond any number": pb.ModelInferRequest(
        model_name="half",
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP16", shape=[2**62, 2**62, 0])],
        raw_input_contents=[b""],
    ),
}


@pytest.mark.parametrize("asked", LARGE.values(), ids=LARGE)
def test_much_of_one_thing_is_refused(bench, asked):
    got = bench.infer(asked)
    assert isinstance(got, ShoalError)
    assert got.code is Code.INVALID_ARGUMENT
    assert len(got.message) < 4000


def test_parameters_that_mean_nothing_here_change_nothing(bench):
    assert output(bench.infer(many_parameters()), "y").tolist() == [[2, 4, 6, 8]]


@pytest.mark.parametrize("raw", LENGTHS, ids=[raw.hex() for raw in LENGTHS])
@pytest.mark.parametrize("shape", [[1, 1], [1, 2], [2, 1], [1, 2**31], [2**31, 2**31]])
def test_text_whose_lengths_lie_is_refused(bench, raw, shape):
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="BYTES", shape=shape)
    got = bench.infer(pb.ModelInferRequest(model_name="text", inputs=[tensor], raw_input_contents=[raw]))
    assert isinstance(got, ShoalError)
    assert got.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("values", [[np.nan] * 4, [np.inf, -np.inf, 0, -0.0], [3e38, -3e38, 1e-45, 0]])
def test_numbers_that_are_none_go_through(bench, values):
    for model in ("double", "cached"):
        x = floats(values)
        with np.errstate(over="ignore"):
            wanted = 2 * x if model == "double" else x
        np.testing.assert_array_equal(output(bench.infer(request(model, x=x)), "y"), wanted)


@pytest.mark.parametrize("model", ["lookup", "double", "cached-lookup"])
def test_an_error_keeps_no_request(bench, model):
    """Its trace must not hold a frame that holds the error: such a circle keeps what was sent."""
    asked = request(model, x=floats([1], [2])) if model == "double" else request(model, i=np.array([[7]]))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            got = bench.infer(asked)
            assert isinstance(got, ShoalError)
            del got
        assert not [each for each in _garbage() if isinstance(each, InferenceRequest | pb.ModelInferRequest)]
    finally:
        gc.enable()


def _garbage() -> list[object]:
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
