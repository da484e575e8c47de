"""A message that is costly to parse is rejected by name, on every path, and another connection is served meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx import TensorProto

from mesh.rpc.channel import connect
from services.infer import core
from services.infer.requests.request import read_steps
from services.infer.requests.signature import Signature
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from shoal.tenant_header import TENANT_HEADER
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving, floats, output, request

SERVICE = "/inference.GRPCInferenceService/"
# Half a million inputs of two bytes each: of 1 MiB, gzip makes 1 kB.
BOMB = b"\x0a\x06double" + b"\x2a\x00" * 524_000
REJECTED = "more than 100000 fields and submessages, the last is inference.ModelInferRequest.inputs"


@pytest.fixture
async def served(serve: Callable[..., object], models_folder: Repository) -> Serving:
    models_folder.bare("double", onnx_files.scale(2))
    models_folder.bare("text", onnx_files.identity(TensorProto.STRING, ("n", "m")))
    models_folder.bare("numbers", onnx_files.identity(TensorProto.FLOAT, ("n", "m")))
    return await serve(models_folder.root)


async def rejection(call: grpc.aio.Call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_bomb_is_rejected_while_another_connection_is_served(
    served: Serving, run_dir: Path, compression: grpc.Compression
) -> None:
    infer = served.channel.unary_unary(SERVICE + "ModelInfer")
    async with connect(f"unix:{run_dir}/infer.sock") as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        answered = 0

        async def bystand() -> None:
            nonlocal answered
            while True:
                assert (await stub.ServerLive(pb.ServerLiveRequest(), timeout=30)).live
                answered += 1

        bystander = asyncio.ensure_future(bystand())
        await until(lambda: answered > 0)
        before = answered
        bombs = [asyncio.ensure_future(rejection(infer(BOMB, compression=compression))) for _ in range(3)]
        for details in await asyncio.gather(*bombs):
            assert REJECTED in details
        assert answered > before
        bystander.cancel()
    response = await served.stub.ModelInfer(request("double", x=floats([1, 2, 3, 4])))
    assert output(response, "y").tolist() == [[2, 4, 6, 8]]


async def test_a_bomb_in_a_stream_ends_the_stream(served: Serving) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield request("double", x=floats([1, 2, 3, 4])).SerializeToString()
        yield BOMB

    call = served.channel.stream_stream(SERVICE + "ModelStreamInfer")(requests())
    assert pb.ModelStreamInferResponse.FromString(await call.read()).infer_response.model_name == "double"
    with pytest.raises(grpc.aio.AioRpcError, match=REJECTED):
        await call.read()


async def test_a_bomb_of_file_overrides_is_rejected(served: Serving) -> None:
    load = served.channel.unary_unary(SERVICE + "RepositoryModelLoad")
    details = await rejection(load(b"\x12\x06double" + b"\x1a\x00" * 200_000))
    assert "more than 100000 fields and submessages, the last is inference.RepositoryModelLoadRequest" in details


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (lambda made: made.inputs.extend([pb.ModelInferRequest.InferInputTensor(name="x")] * 5_000), "inputs"),
        (lambda made: made.outputs.extend([pb.ModelInferRequest.InferRequestedOutputTensor()] * 5_000), "outputs"),
        (lambda made: made.raw_input_contents.extend([b""] * 5_000), "raw_input_contents"),
        (lambda made: [made.parameters[str(n)].SetInParent() for n in range(5_000)], "parameters"),
    ],
    ids=["inputs", "outputs", "raw", "parameters"],
)
async def test_the_tensors_and_parameters_of_a_request_are_bounded(
    served: Serving, fill: Callable[[pb.ModelInferRequest], object], named: str
) -> None:
    made = request("double", x=floats([1, 2, 3, 4]))
    fill(made)
    details = await rejection(served.stub.ModelInfer(made))
    assert f"{named}: a request for model 'double' has 500" in details
    assert "at most" in details


async def test_a_request_of_ten_thousand_typed_strings_is_served(served: Serving) -> None:
    strings = [f"a string of some length, number {n}".encode() for n in range(10_000)]
    made = pb.ModelInferRequest(model_name="text")
    made.inputs.add(
        name="x", datatype="BYTES", shape=[2, 5_000], contents=pb.InferTensorContents(bytes_contents=strings)
    )
    assert made.ByteSize() > 256 << 10
    assert output(await served.stub.ModelInfer(made), "y").reshape(-1).tolist() == strings


async def test_a_request_of_four_million_typed_numbers_is_served(served: Serving) -> None:
    values = np.arange(4_000_000, dtype=np.float32)
    made = pb.ModelInferRequest(model_name="numbers")
    made.inputs.add(
        name="x", datatype="FP32", shape=[4, 1_000_000], contents=pb.InferTensorContents(fp32_contents=values)
    )
    response = await served.stub.ModelInfer(made)
    np.testing.assert_array_equal(output(response, "y").reshape(-1), values)


async def test_small_calls_end_while_the_texts_of_another_tenant_wait(served: Serving, run_dir: Path) -> None:
    texts = np.array([b"%04d" % (n % 10_000) for n in range(200_000)], object).reshape(1, -1)
    costly, small = request("text", x=texts), request("double", x=floats([1, 2, 3, 4]))
    ended: list[str] = []

    async def call(
        name: str, stub: inference_pb2_grpc.GRPCInferenceServiceAsyncStub, made: pb.ModelInferRequest
    ) -> None:
        await stub.ModelInfer(made, timeout=60, metadata=((TENANT_HEADER, name),))
        ended.append(name)

    async with connect(f"unix:{run_dir}/infer.sock") as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await call("warm", stub, small)
        flood = [asyncio.ensure_future(call("flood", served.stub, costly)) for _ in range(8)]
        await until(lambda: bool(served.core.heavy._waiting))
        for _ in range(20):
            await call("bystander", stub, small)
    # A small call waits for some turns of a millisecond. Those texts have a hundred turns each.
    assert ended.count("flood") <= 4
    for each in flood:
        each.cancel()
    await asyncio.wait(flood, timeout=30)
    await until(lambda: not served.core.heavy._waiting)


async def test_raw_texts_have_the_bound_of_typed_ones(served: Serving) -> None:
    texts = np.array([b""] * 300_001, object).reshape(1, -1)
    details = await rejection(served.stub.ModelInfer(request("text", x=texts)))
    assert details == (
        "inputs: a request for model 'text' has more than 300000 elements of BYTES: send fewer at a time"
    )
    response = await served.stub.ModelInfer(request("text", x=texts[:, 1:]))
    assert response.outputs[0].shape == [1, 300_000]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_raw_contents_of_a_large_request_are_not_copied_on_the_slow_path(
    served: Serving, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    read: list[object] = []

    def watched(message: pb.ModelInferRequest, signature: Signature) -> object:
        read.append(message.raw_input_contents)
        return read_steps(message, signature)

    monkeypatch.setattr(core, "read_steps", watched)
    made = request("numbers", x=np.ones((1, 2 << 20), np.float32))
    # A small response.
    made.outputs.add(name="y").parameters["classification"].int64_param = 1
    if is_stream:

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            yield made

        async for responses in served.stub.ModelStreamInfer(requests()):
            response = responses.infer_response
    else:
        response = await served.stub.ModelInfer(made)
    assert output(response, "y").tolist() == [[b"1.000000:0"]]
    ((contents,),) = read
    assert isinstance(contents, memoryview)
