"""Asking models, through both faces of the client."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal.client.transport import methods
from shoal.client.transport.retry import RetryPolicy
from shoal.errors import Cancelled, DataLoss, FailedPrecondition, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal.inference.v2 import inference_pb2 as oip
from tests.client.served import Served

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001)


async def echo(request: Any, context: Any) -> Any:
    """Answers with its inputs, and says under `asked` how it was asked."""
    response = oip.ModelInferResponse(model_name=request.model_name, model_version="3", id=request.id)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.extend(request.raw_input_contents)
    response.parameters["asked"].string_param = ",".join(output.name for output in request.outputs)
    for key, parameter in request.parameters.items():
        response.parameters[key].CopyFrom(parameter)
    return response


async def metadata(request: Any, context: Any) -> Any:
    if request.name != "m":
        await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
    response = oip.ModelMetadataResponse(name="m", versions=["1"], platform="onnxruntime_onnx")
    response.inputs.add(name="x", datatype="FP32", shape=[-1, 2])
    response.inputs.add(name="t", datatype="BYTES", shape=[-1])
    return response


@pytest.fixture
def client(served: Served) -> Iterator[shoal.Client]:
    served.on(methods.MODEL_INFER, echo)
    served.on(methods.MODEL_METADATA, metadata)
    with shoal.Client(served.address, retry=QUICK) as client:
        yield client


def test_arrays_in_and_arrays_out(client: shoal.Client, served: Served) -> None:
    array = np.arange(6, dtype=np.float16).reshape(3, 2)
    result = client.infer(
        "m",
        {"x": array, "t": np.array(["a", b"\xff"], dtype=object)},
        outputs=["x", "t"],
        version=3,
        parameters={"explain": True, "n": -5, "big": 2**63, "f": 0.5, "s": "text"},
        request_id="r1",
    )
    assert (result.model_name, result.model_version, result.id) == ("m", "3", "r1")
    np.testing.assert_array_equal(result["x"], array)
    assert result["x"].dtype == np.float16
    assert result["t"].tolist() == [b"a", b"\xff"]
    assert result.datatypes == {"x": "FP16", "t": "BYTES"}
    assert result.parameters == {"explain": True, "n": -5, "big": 2**63, "f": 0.5, "s": "text", "asked": "x,t"}
    result["x"][0] = 9  # The caller's own.
    assert served.count(methods.MODEL_METADATA) == 0
    with pytest.raises(KeyError, match="no output 'y': the outputs are x, t"):
        result["y"]


def test_lists_take_the_datatype_of_the_metadata(client: shoal.Client, served: Served) -> None:
    result = client.infer("m", {"x": [[1, 2]], "t": ["é"]})
    assert result["x"].dtype == np.float32
    assert result["t"].tolist() == ["é".encode()]
    assert served.count(methods.MODEL_METADATA) == 1
    assert client.infer("m", {"x": [[1, 2]]}, datatypes={"x": "INT8"})["x"].dtype == np.int8
    assert served.count(methods.MODEL_METADATA) == 1
    with pytest.raises(InvalidArgument, match="input 'x': expected FP32"):
        client.infer("m", {"x": [["a", "b"]]})
    with pytest.raises(NotFound, match="unknown model: 'other'"):
        client.infer("other", {"x": [[1, 2]]})


def test_without_metadata_lists_take_numpys_datatype(served: Served) -> None:
    served.on(methods.MODEL_INFER, echo)
    with shoal.Client(served.address) as client:
        assert client.infer("m", {"x": [[1, 2]]})["x"].dtype == np.int64


def test_bfloat16(client: shoal.Client) -> None:
    result = client.infer("m", {"x": shoal.BFloat16.of([1.0, -2.5])})
    assert result.datatypes == {"x": "BF16"}
    assert shoal.BFloat16(result["x"]).float32().tolist() == [1.0, -2.5]
    assert client.infer("m", {"x": np.float32([1.0])}, datatypes={"x": "BF16"}).datatypes == {"x": "BF16"}


def test_an_invalid_input_is_not_sent(client: shoal.Client, served: Served) -> None:
    for options in ({"parameters": {"p": 2**64}}, {"parameters": {"p": None}}, {"headers": {"Bad": "x"}}):
        with pytest.raises(InvalidArgument):
            client.infer("m", {"x": np.zeros(1)}, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="no model"):
        client.infer("", {"x": np.zeros(1)})
    assert served.count(methods.MODEL_INFER) == 0


def failing_first(code: grpc.StatusCode) -> Any:
    left = [1]

    async def behaviour(request: Any, context: Any) -> Any:
        if left[0]:
            left[0] = 0
            await context.abort(code, "once")
        return await echo(request, context)

    return behaviour


def test_infer_is_retried_unless_it_is_a_step_of_a_sequence(served: Served) -> None:
    with shoal.Client(served.address, retry=QUICK) as client:
        served.on(methods.MODEL_INFER, failing_first(grpc.StatusCode.UNAVAILABLE))
        client.infer("m", {"x": np.zeros(1)})
        served.on(methods.MODEL_INFER, failing_first(grpc.StatusCode.UNAVAILABLE))
        with pytest.raises(Unavailable, match="infer with m: once"):
            client.infer("m", {"x": np.zeros(1)}, parameters={"sequence_id": 7})


def test_an_inconsistent_answer_is_data_loss(served: Served) -> None:
    async def lying(request: Any, context: Any) -> Any:
        response = oip.ModelInferResponse(model_name="m")
        response.outputs.add(name="y", datatype="FP32", shape=[4])
        response.raw_output_contents.append(b"123")
        return response

    served.on(methods.MODEL_INFER, lying)
    with shoal.Client(served.address) as client, pytest.raises(DataLoss, match="output 'y'"):
        client.infer("m", {"x": np.zeros(1)})


async def stream(requests: Any, context: Any) -> Any:
    async for request in requests:
        response = oip.ModelStreamInferResponse(infer_response=await echo(request, context))
        if request.id == "bad":
            response.error_message = "no"
        yield response


def test_a_stream_yields_answers_in_order_of_arrival_and_continues_after_errors(
    client: shoal.Client, served: Served
) -> None:
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")
    requests = (shoal.InferRequest("m", {"x": [[i, i]]}, request_id=name) for i, name in enumerate(["a", "bad", "c"]))
    results = list(client.infer_stream(requests))
    assert [result.id for result in results] == ["a", "bad", "c"]
    assert results[2]["x"].tolist() == [[2, 2]]
    assert isinstance(results[1].error, ShoalError)
    with pytest.raises(ShoalError, match="no"):
        results[1]["x"]
    assert served.count(methods.MODEL_METADATA) == 1


def test_an_error_of_the_source_reaches_the_caller(client: shoal.Client, served: Served) -> None:
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")

    def source() -> Iterator[shoal.InferRequest]:
        yield shoal.InferRequest("m", {"x": np.zeros(1)}, request_id="a")
        raise RuntimeError("out of files")

    results = client.infer_stream(source())
    assert next(results).id == "a"
    with pytest.raises(RuntimeError, match="out of files"):
        next(results)


def test_a_stream_may_be_left_early(client: shoal.Client, served: Served) -> None:
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")

    def endless() -> Iterator[shoal.InferRequest]:
        while True:
            yield shoal.InferRequest("m", {"x": np.zeros(1)})

    for result in client.infer_stream(endless()):
        assert result["x"].tolist() == [0]
        break
    client.infer("m", {"x": np.zeros(1)})


def test_a_source_may_use_the_client_itself(client: shoal.Client, served: Served) -> None:
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")

    def source() -> Iterator[shoal.InferRequest]:
        for _ in range(3):
            yield shoal.InferRequest("m", {"x": client.infer("m", {"x": np.ones(1)})["x"]})

    assert [result["x"].tolist() for result in client.infer_stream(source())] == [[1]] * 3


async def test_the_async_client(served: Served) -> None:
    served.on(methods.MODEL_INFER, echo)
    async with shoal.Client(served.address) as client:
        assert isinstance(client, shoal.AsyncClient)
        assert (await client.infer("m", {"x": np.ones(2)}))["x"].tolist() == [1, 1]
    client = shoal.AsyncClient(served.address)
    await client.infer("m", {"x": np.ones(2)})
    await client.close()
    with pytest.raises(FailedPrecondition, match="this client is closed"):
        await client.infer("m", {"x": np.ones(2)})


def test_many_threads_share_a_client(client: shoal.Client) -> None:
    got: list[float] = []

    def work(number: int) -> None:
        for _ in range(20):
            got.append(float(client.infer("m", {"x": np.float64([number])})["x"][0]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(float(n) for n in range(4) for _ in range(20))


def test_closing_twice_and_calling_after(client: shoal.Client) -> None:
    client.infer("m", {"x": np.zeros(1)})
    client.close()
    client.close()
    with pytest.raises(FailedPrecondition, match="this client is closed"):
        client.infer("m", {"x": np.zeros(1)})


def hanging(arrived: threading.Event) -> Any:
    async def behaviour(request: Any, context: Any) -> Any:
        arrived.set()
        await asyncio.Event().wait()

    return behaviour


def test_closing_from_another_thread_ends_a_call(served: Served) -> None:
    arrived = threading.Event()

    client = shoal.Client(served.address)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            client.infer("m", {"x": np.zeros(1)})
        except ShoalError as err:
            caught.append(err)

    thread = threading.Thread(target=call)
    served.on(methods.MODEL_INFER, hanging(arrived))
    thread.start()
    assert arrived.wait(30)
    client.close()
    thread.join(30)
    assert isinstance(caught[0], Cancelled)


def test_a_dropped_client_leaves_no_thread(served: Served) -> None:
    served.on(methods.MODEL_INFER, echo)
    before = threading.active_count()
    shoal.Client(served.address).infer("m", {"x": np.zeros(1)})
    assert not [thread for thread in threading.enumerate() if thread.name == "shoal-client"]
    assert threading.active_count() <= before + 1  # grpc keeps one poller for the process.


def test_an_invalid_address_is_rejected() -> None:
    with pytest.raises(InvalidArgument, match="is no address"):
        shoal.Client("nowhere")


def never_answered(served: Served) -> threading.Event:
    """Serve streams without responses; return the event of the first request."""
    arrived = threading.Event()

    async def silent(requests: Any, context: Any) -> Any:
        async for _ in requests:
            arrived.set()
        await asyncio.Event().wait()
        yield

    served.on(methods.MODEL_STREAM_INFER, silent, "stream_stream")
    return arrived


def test_an_interrupt_between_the_start_of_a_step_and_the_wait_for_it(client: shoal.Client, served: Served) -> None:
    arrived = never_answered(served)

    start = asyncio.run_coroutine_threadsafe
    patch = pytest.MonkeyPatch()

    def interrupted(coroutine: Any, loop: Any) -> Any:
        patch.undo()
        start(coroutine, loop)
        assert arrived.wait(30)
        raise KeyboardInterrupt

    stream = client.infer_stream([shoal.InferRequest("m", {"x": np.zeros(1)})])
    patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert client.infer("m", {"x": np.zeros(1)})["x"].tolist() == [0]


def test_an_interrupt_while_an_iterator_waits(client: shoal.Client, served: Served) -> None:
    arrived = never_answered(served)

    main = threading.get_ident()

    def interrupt() -> None:
        arrived.wait(30)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(client.infer_stream([shoal.InferRequest("m", {"x": np.zeros(1)})]))
    assert client.infer("m", {"x": np.zeros(1)})["x"].tolist() == [0]
