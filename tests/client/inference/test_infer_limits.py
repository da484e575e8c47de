"""Inference within one deadline, with signatures that are kept, retries as the caller says, and typed errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal.client.inference.requests import SIGNATURE_S, SIGNATURES, RequestEncoder
from shoal.client.transport import methods
from shoal.client.transport.retry import RetryPolicy
from shoal.errors import (
    ERROR_CODE_PARAMETER,
    RETRY_AFTER_PARAMETER,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ShoalError,
    Unavailable,
)
from shoal.inference.v2 import inference_pb2 as oip
from tests.client.inference.test_infer_calls import QUICK, echo, failing_first, hanging, stream
from tests.client.served import Served
from tests.client.transport.test_calls import World

ARRAY = {"x": np.float32([1])}
LIST = {"x": [1.0]}


class Model:
    """A model whose input may change its datatype."""

    def __init__(self, served: Served, datatype: str = "FP32") -> None:
        self.datatype = datatype
        served.on(methods.MODEL_INFER, self.infer)
        served.on(methods.MODEL_METADATA, self.metadata)

    async def metadata(self, request: Any, context: Any) -> Any:
        response = oip.ModelMetadataResponse(name=request.name)
        response.inputs.add(name="x", datatype=self.datatype, shape=[-1])
        return response

    async def infer(self, request: Any, context: Any) -> Any:
        if request.inputs[0].datatype != self.datatype:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"input 'x': expected {self.datatype}")
        return await echo(request, context)


@pytest.fixture
def client(served: Served) -> Iterator[shoal.Client]:
    with shoal.Client(served.address, retry=QUICK) as client:
        yield client


def test_the_timeout_covers_the_metadata(client: shoal.Client, served: Served) -> None:
    served.on(methods.MODEL_INFER, echo)
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")
    served.on(methods.MODEL_METADATA, hanging(threading.Event()))
    with pytest.raises(DeadlineExceeded, match=r"read the inputs of m: no response within 0\.1 s"):
        client.infer("m", LIST, timeout=0.1)
    with pytest.raises(DeadlineExceeded, match=r"no response within 0\.1 s"):
        list(client.infer_stream([shoal.InferRequest("m", LIST)], timeout=0.1))
    with pytest.raises(DeadlineExceeded, match=r"read the inputs of m: no response within 0\.1 s"):
        client.jobs.submit("m", LIST, timeout=0.1)
    assert served.count(methods.MODEL_INFER) == 0


async def test_retries_of_the_metadata_end_with_the_deadline_of_the_call(served: Served) -> None:
    async def never(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    served.on(methods.MODEL_METADATA, never)
    world = World()
    caller = world.caller(served.address, retry=RetryPolicy(attempts=100))
    with pytest.raises(Unavailable, match="not now"):
        await RequestEncoder(caller).encode(shoal.InferRequest("m", LIST), caller.deadline(0.5))
    assert 0.2 < sum(world.slept) < 0.5


async def test_what_the_metadata_took_is_missing_from_the_rest(served: Served) -> None:
    world, left = World(), []

    async def slow(request: Any, context: Any) -> Any:
        world.now += 400
        return oip.ModelMetadataResponse()

    async def infer(request: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        return await echo(request, context)

    served.on(methods.MODEL_METADATA, slow)
    served.on(methods.MODEL_INFER, infer)
    async with shoal.AsyncClient(served.address) as client:
        client._caller.clock = world.clock
        await client.infer("m", LIST, timeout=1_000)
    # Some seconds pass on the way, and grpc.aio adds up to one percent.
    assert 520 < left[0] < 620


def test_without_a_timeout_a_call_has_no_deadline(client: shoal.Client, served: Served) -> None:
    left: list[float | None] = []

    async def infer(request: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        return await echo(request, context)

    async def responses(requests: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        async for response in stream(requests, context):
            yield response

    Model(served)
    served.on(methods.MODEL_INFER, infer)
    served.on(methods.MODEL_STREAM_INFER, responses, "stream_stream")
    client.infer("m", LIST, timeout=None)
    list(client.infer_stream([shoal.InferRequest("m", LIST)], timeout=None))
    assert left == [None, None]
    with pytest.raises(InvalidArgument, match="timeout='5': expected seconds"):
        client.infer("m", ARRAY, timeout="5")  # type: ignore[arg-type]


def test_signatures_are_kept_for_seconds_for_each_version(client: shoal.Client, served: Served) -> None:
    world = World()
    client._inner._caller.clock = world.clock
    Model(served)
    for _ in range(3):
        client.infer("m", LIST)
    assert served.count(methods.MODEL_METADATA) == 1
    client.infer("m", LIST, version=2)
    client.infer("other", LIST)
    assert served.count(methods.MODEL_METADATA) == 3
    world.now += SIGNATURE_S
    client.infer("m", LIST)
    assert served.count(methods.MODEL_METADATA) == 4


async def test_no_more_signatures_are_kept_than_the_limit(served: Served) -> None:
    Model(served)
    caller = World().caller(served.address)
    encoder = RequestEncoder(caller)
    for number in range(SIGNATURES + 10):
        await encoder.encode(shoal.InferRequest(f"m{number}", LIST))
    assert len(encoder._signatures) == SIGNATURES
    await encoder.encode(shoal.InferRequest(f"m{SIGNATURES}", LIST))
    assert served.count(methods.MODEL_METADATA) == SIGNATURES + 10


def test_a_rejected_datatype_is_read_again(client: shoal.Client, served: Served) -> None:
    model = Model(served, "FP32")
    assert client.infer("m", LIST).datatypes == {"x": "FP32"}
    model.datatype = "INT64"
    assert client.infer("m", LIST).datatypes == {"x": "INT64"}
    assert (served.count(methods.MODEL_METADATA), served.count(methods.MODEL_INFER)) == (2, 3)
    # A value that only the new datatype can carry.
    model.datatype = "BYTES"
    assert client.infer("m", {"x": ["text"]}).datatypes == {"x": "BYTES"}
    assert (served.count(methods.MODEL_METADATA), served.count(methods.MODEL_INFER)) == (3, 4)


def test_a_rejection_with_the_same_datatypes_is_not_repeated(client: shoal.Client, served: Served) -> None:
    async def reject(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the model wants a positive x")

    Model(served)
    client.infer("m", LIST)
    served.on(methods.MODEL_INFER, reject)
    with pytest.raises(InvalidArgument, match="positive"):
        client.infer("m", LIST)
    assert (served.count(methods.MODEL_METADATA), served.count(methods.MODEL_INFER)) == (2, 2)


def test_a_request_that_must_not_be_repeated_is_sent_once_also_with_other_datatypes(
    client: shoal.Client, served: Served
) -> None:
    model = Model(served, "FP32")
    client.infer("m", LIST)
    for options in ({"retries": 0}, {"parameters": {"sequence_id": 1}}):
        model.datatype, sent = "INT64" if model.datatype == "FP32" else "FP32", served.count(methods.MODEL_INFER)
        with pytest.raises(InvalidArgument, match="expected"):
            client.infer("m", LIST, **options)  # type: ignore[arg-type]
        assert served.count(methods.MODEL_INFER) == sent + 1
        client.infer("m", LIST)
        assert served.count(methods.MODEL_INFER) == sent + 2


def test_an_invalid_request_on_a_stream_drops_the_signature(client: shoal.Client, served: Served) -> None:
    async def responses(requests: Any, context: Any) -> Any:
        async for request in requests:
            rejected = oip.ModelStreamInferResponse(error_message="expected INT64")
            rejected.infer_response.model_name = request.model_name
            rejected.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param = 3
            yield rejected

    Model(served)
    served.on(methods.MODEL_STREAM_INFER, responses, "stream_stream")
    for _ in range(2):
        [result] = client.infer_stream([shoal.InferRequest("m", LIST)])
        assert isinstance(result.error, InvalidArgument)
    assert served.count(methods.MODEL_METADATA) == 2


def test_the_caller_says_how_often_a_request_is_repeated(client: shoal.Client, served: Served) -> None:
    for retries, sent in ((0, 1), (1, 2), (7, 8)):
        before = served.count(methods.MODEL_INFER)
        served.on(methods.MODEL_INFER, failing_always)
        with pytest.raises(Unavailable):
            client.infer("m", ARRAY, retries=retries)
        assert served.count(methods.MODEL_INFER) == before + sent
    served.on(methods.MODEL_INFER, failing_first(grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(Unavailable):
        client.infer("m", ARRAY, retries=3, parameters={"sequence_id": 1})
    for wrong in (-1, "no", 1.5):
        with pytest.raises(InvalidArgument, match="retries="):
            client.infer("m", ARRAY, retries=wrong)  # type: ignore[arg-type]


async def failing_always(request: Any, context: Any) -> Any:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


def test_every_call_names_the_tenant(served: Served) -> None:
    Model(served)
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")

    def named() -> list[str | None]:
        seen = [each.get("x-shoal-tenant") for each in served.metadata]
        served.metadata.clear()
        return seen

    with shoal.Client(served.address, tenant="gold", headers={"x-team": "blue"}) as client:
        client.infer("m", LIST)
        list(client.infer_stream([shoal.InferRequest("m", LIST)]))
        with pytest.raises(ShoalError):
            client.jobs.submit("m", ARRAY)
        assert all(each["x-team"] == "blue" for each in served.metadata)
        assert named() == ["gold"] * 4
        # Headers of one call replace those of the client.
        client.infer("m", ARRAY, headers={"x-shoal-tenant": "silver", "x-team": "red"})
        assert served.metadata[0]["x-team"] == "red"
        assert named() == ["silver"]
    with shoal.Client(served.address) as client:
        client.infer("m", ARRAY)
    # As ingest does for jobs: no header carries these characters.
    with shoal.Client(served.address, tenant="ädä") as client:
        client.infer("m", ARRAY)
    assert named() == [None, "?"]


def test_errors_of_a_stream_have_the_class_of_their_code(client: shoal.Client, served: Served) -> None:
    async def responses(requests: Any, context: Any) -> Any:
        async for request in requests:
            failed = oip.ModelStreamInferResponse(error_message=f"failed with {request.id}")
            failed.infer_response.id = request.id
            if request.id.isdecimal():
                failed.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param = int(request.id)
                failed.infer_response.parameters[RETRY_AFTER_PARAMETER].int64_param = 50
            elif request.id == "text":
                failed.infer_response.parameters[ERROR_CODE_PARAMETER].string_param = "8"
            yield failed

    served.on(methods.MODEL_STREAM_INFER, responses, "stream_stream")
    requests = [shoal.InferRequest("m", ARRAY, request_id=name) for name in ("8", "5", "99", "none", "text")]
    errors = [result.error for result in client.infer_stream(requests)]
    assert [type(error) for error in errors] == [ResourceExhausted, NotFound, ShoalError, ShoalError, ShoalError]
    assert errors[0] is not None
    assert (errors[0].message, errors[0].retry_after_ms) == ("failed with 8", 50)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"inputs": np.float32([1])}, r"inputs: expected a mapping, such as \{\"x\": array\}, got ndarray"),
        ({"inputs": [1]}, "inputs: expected a mapping"),
        ({"inputs": None}, "inputs: expected a mapping"),
        ({"outputs": "y"}, r"outputs: expected a list of names, such as \['y'\], got text"),
        ({"parameters": ["a"]}, "parameters: expected a mapping"),
        ({"datatypes": ["FP32"]}, "datatypes: expected a mapping"),
        ({"model": 5}, "infer with 5: "),
        ({"inputs": {5: np.float32([1])}}, "infer with m: "),
        ({"request_id": 5}, "infer with m: "),
        ({"outputs": [5]}, "infer with m: "),
        ({"request_id": "\ud800"}, "infer with m: "),
        ({"headers": {"x-a": 5}}, "header 'x-a': expected text"),
        ({"headers": {5: "a"}}, "header 5: expected text"),
    ],
)
def test_a_wrong_argument_is_an_invalid_argument(
    client: shoal.Client, served: Served, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        client.infer(**{"model": "m", "inputs": ARRAY, **arguments})
    assert served.count(methods.MODEL_INFER) == 0


def test_an_async_client_is_used_on_one_event_loop_after_another(served: Served) -> None:
    served.on(methods.MODEL_INFER, echo)
    client = shoal.AsyncClient(served.address)

    async def once() -> None:
        assert (await client.infer("m", ARRAY))["x"].tolist() == [1]

    for _ in range(3):
        asyncio.run(once())
    assert len(client._caller._transports) == 1
    asyncio.run(client.close())
    with pytest.raises(FailedPrecondition, match="closed"):
        asyncio.run(once())


def test_a_client_is_used_on_two_event_loops_and_closing_it_ends_the_calls_of_both(served: Served) -> None:
    served.on(methods.MODEL_INFER, echo)
    client, arrived = shoal.Client(served.address), threading.Event()
    client.infer("m", ARRAY)

    async def both() -> BaseException:
        async with client as other:
            assert (await other.infer("m", ARRAY))["x"].tolist() == [1]
            await asyncio.to_thread(client.infer, "m", ARRAY)
            served.on(methods.MODEL_INFER, hanging(arrived))
            blocked = asyncio.create_task(asyncio.to_thread(client.infer, "m", ARRAY))
            await asyncio.to_thread(arrived.wait, 20)
        [error] = await asyncio.gather(blocked, return_exceptions=True)
        assert isinstance(error, BaseException)
        return error

    assert isinstance(asyncio.run(both()), Cancelled)
    client.close()


def test_a_callback_that_calls_its_own_client_gets_an_error(client: shoal.Client, served: Served) -> None:
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")

    async def source() -> AsyncIterator[shoal.InferRequest]:
        client.infer("m", ARRAY)
        yield shoal.InferRequest("m", ARRAY)

    with pytest.raises(FailedPrecondition, match="a callback of this client cannot wait for a call of the same client"):
        list(client.infer_stream(source()))


def test_live_and_ready(client: shoal.Client, served: Served) -> None:
    async def live(request: Any, context: Any) -> Any:
        return oip.ServerLiveResponse(live=True)

    async def ready(request: Any, context: Any) -> Any:
        return oip.ServerReadyResponse(ready=False)

    served.on(methods.SERVER_LIVE, live)
    served.on(methods.SERVER_READY, ready)
    assert (client.live(), client.ready()) == (True, False)


def test_load_and_unload(client: shoal.Client, served: Served) -> None:
    seen: list[Any] = []

    async def load(request: Any, context: Any) -> Any:
        seen.append(request)
        return oip.RepositoryModelLoadResponse()

    async def unload(request: Any, context: Any) -> Any:
        seen.append(request)
        return oip.RepositoryModelUnloadResponse()

    served.on(methods.MODEL_LOAD, load)
    served.on(methods.MODEL_UNLOAD, unload)
    client.models.load("m")
    client.models.load("m", config={"backend": "onnxruntime"}, files={"1/model.onnx": b"\0"})
    client.models.load("m", config='{"name": "m"}')
    client.models.unload("m")
    client.models.unload("m", dependents=True)
    assert [request.model_name for request in seen] == ["m"] * 5
    assert [len(request.parameters) for request in seen] == [0, 2, 1, 0, 1]
    assert seen[1].parameters["config"].string_param == '{"backend": "onnxruntime"}'
    assert seen[1].parameters["file:1/model.onnx"].bytes_param == b"\0"
    assert seen[2].parameters["config"].string_param == '{"name": "m"}'
    assert seen[4].parameters["unload_dependents"].bool_param
