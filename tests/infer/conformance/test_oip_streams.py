"""ModelStreamInfer: many requests on one stream, in order, errors in-band, and ends of every kind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import floats, request


class Sender:
    """A request iterator that a test feeds by hand."""

    def __init__(self) -> None:
        self._queue: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()

    def send(self, made: pb.ModelInferRequest) -> None:
        self._queue.put(made)

    def close(self) -> None:
        self._queue.put(None)

    def until_sent(self) -> None:
        """Waits until gRPC has sent what was given: only then it asks for more."""
        self._queue.join()

    def __iter__(self) -> Iterator[pb.ModelInferRequest]:
        while (made := self._queue.get()) is not None:
            yield made
            self._queue.task_done()


@pytest.fixture
def sender() -> Iterator[Sender]:
    sender = Sender()
    yield sender
    sender.close()


def test_responses_come_in_the_order_of_the_requests(stub):
    asked = [request("double", floats(start=n), id=str(n)) for n in range(200)]
    responses = list(stub.ModelStreamInfer(iter(asked), timeout=wire.PATIENCE_S))
    assert [response.infer_response.id for response in responses] == [str(n) for n in range(200)]
    assert [wire.array(response.infer_response, "y")[0, 0] for response in responses] == [2 * n for n in range(200)]


def test_different_models_on_one_stream(stub):
    asked = [request("double", floats(), id="a"), request("add", floats("a"), floats("b"), id="b")]
    responses = list(stub.ModelStreamInfer(iter(asked), timeout=wire.PATIENCE_S))
    assert [(response.infer_response.model_name, response.infer_response.id) for response in responses] == [
        ("double", "a"),
        ("add", "b"),
    ]


def test_a_response_comes_while_the_stream_stays_open(stub, sender):
    """A conversation: the client waits for each response before it asks again."""
    call = stub.ModelStreamInfer(iter(sender), timeout=wire.PATIENCE_S)
    for n in range(5):
        sender.send(request("double", floats(start=n)))
        assert wire.array(next(call).infer_response, "y")[0, 0] == 2 * n
    sender.close()
    with pytest.raises(StopIteration):
        next(call)
    assert call.code() is grpc.StatusCode.OK


def test_a_stream_without_a_request(stub):
    call = stub.ModelStreamInfer(iter(()), timeout=wire.PATIENCE_S)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_an_error_is_in_band_and_the_stream_lives_on(stub, sender):
    call = stub.ModelStreamInfer(iter(sender), timeout=wire.PATIENCE_S)
    for n in range(3):
        sender.send(request("nope", floats(), id=f"wrong-{n}"))
        response = next(call)
        assert response.error_message.startswith("Request for unknown model: 'nope' is not found")
        assert response.infer_response.id == f"wrong-{n}"
        sender.send(request("double", floats(), id=f"right-{n}"))
        response = next(call)
        assert (response.error_message, response.infer_response.id) == ("", f"right-{n}")


@pytest.mark.parametrize("asks", [True, False])
def test_the_final_response_of_a_model_with_one_response(stub, asks):
    """Whoever asks for the final marker gets it on the one response, and no empty response after it."""
    parameters = {"triton_enable_empty_final_response": True} if asks else {}
    (response,) = list(
        stub.ModelStreamInfer(iter([request("double", floats(), parameters=parameters)]), timeout=wire.PATIENCE_S)
    )
    assert wire.array(response.infer_response, "y")[0].tolist() == [2, 4, 6, 8]
    assert response.infer_response.parameters["triton_final_response"].bool_param is True


def test_the_deadline_of_a_stream(stub, sender):
    call = stub.ModelStreamInfer(iter(sender), timeout=2)
    sender.send(request("double", floats()))
    assert wire.array(next(call).infer_response, "y")[0].tolist() == [2, 4, 6, 8]
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert wire.status(caught.value)[0] == "DEADLINE_EXCEEDED"


def test_a_client_that_leaves_takes_its_requests_along(stub, sender):
    """Three of four rows wait for a fourth that never comes: when the stream is cancelled they leave the queue."""
    before = wire.failures(stub, "patient")
    call = stub.ModelStreamInfer(iter(sender), timeout=wire.PATIENCE_S)
    sender.send(request("double", floats()))
    next(call)
    sender.send(request("patient", floats(rows=3)))
    sender.until_sent()
    stub.ServerLive(pb.ServerLiveRequest())  # Behind it on the same connection.
    call.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert wire.status(caught.value)[0] == "CANCELLED"
    wire.until(lambda: wire.failures(stub, "patient") > before, "the cancelled request is counted")
    # One row alone would have completed the batch of the three that left: it does not.
    with pytest.raises(grpc.RpcError) as late:
        stub.ModelInfer(request("patient", floats()), timeout=0.3)
    assert wire.status(late.value)[0] == "DEADLINE_EXCEEDED"


def test_many_streams_at_once(stub):
    """Each gets its own responses."""
    wrong: list[str] = []

    def converse(n: int) -> None:
        asked = [request("double", floats(start=1000 * n + k), id=f"{n}/{k}") for k in range(50)]
        for k, response in enumerate(stub.ModelStreamInfer(iter(asked), timeout=wire.PATIENCE_S)):
            got = (response.infer_response.id, wire.array(response.infer_response, "y")[0, 0])
            if got != (f"{n}/{k}", 2 * (1000 * n + k)):
                wrong.append(f"{n}/{k}: {got}")

    threads = [threading.Thread(target=converse, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(wire.PATIENCE_S)
    assert not wrong
