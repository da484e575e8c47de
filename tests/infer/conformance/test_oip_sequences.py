"""Sequences of a served instance: order, state, and refusals, in unary calls and on streams."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, request

_IDS = itertools.count(1)


def step(id: object, x: float = 1, *, start: bool = False, end: bool = False, rows: int = 1) -> pb.ModelInferRequest:
    sent = Given("x", "FP32", (rows, 1), np.full((rows, 1), x, "<f4").tobytes())
    given = {"sequence_id": id, "sequence_start": start, "sequence_end": end}
    return request(
        "steps", sent, parameters={name: value for name, value in given.items() if value not in (None, False)}
    )


def total(response: pb.ModelInferResponse) -> float:
    return float(wire.array(response, "total")[0, 0])


@pytest.fixture
def send(stub):
    def call(asked: pb.ModelInferRequest) -> float:
        return total(stub.ModelInfer(asked, timeout=wire.PATIENCE_S))

    return call


def test_unary(send):
    id = next(_IDS)
    # Often enough that a server that learns a client's messages would have learnt this one.
    totals = [send(step(id, n, start=n == 1, end=n == 20)) for n in range(1, 21)]
    assert totals == np.cumsum(range(1, 21)).tolist()


def test_unary_without_an_id_after_many_with_one(send, refused):
    id = next(_IDS)
    for n in range(5):
        send(step(id, n, start=n == 0))
    message = refused("INVALID_ARGUMENT", step(None))
    assert message == "inference request to model 'steps' must specify a non-zero or non-empty correlation ID"
    send(step(id, end=True))


def test_refusals(refused):
    for id in (0, ""):
        assert "must specify a non-zero or non-empty correlation ID" in refused("INVALID_ARGUMENT", step(id))
    assert "must specify the START flag" in refused("INVALID_ARGUMENT", step(next(_IDS)))
    assert "must specify batch-size 1" in refused("INVALID_ARGUMENT", step(next(_IDS), start=True, rows=2))
    assert "CONTROL_SEQUENCE_CORRID" in refused("INVALID_ARGUMENT", step("text", start=True))


def test_a_stream_of_several_sequences(stub):
    ids = [next(_IDS) for _ in range(3)]
    asked = [step(id, n, start=n == 1, end=n == 10) for n in range(1, 11) for id in ids]
    responses = list(stub.ModelStreamInfer(iter(asked), timeout=wire.PATIENCE_S))
    assert [total(response.infer_response) for response in responses] == np.repeat(np.cumsum(range(1, 11)), 3).tolist()


def test_calls_at_once_run_in_order(stub):
    id = next(_IDS)
    stub.ModelInfer(step(id, 0, start=True), timeout=wire.PATIENCE_S)
    calls = [stub.ModelInfer.future(step(id, 1), timeout=wire.PATIENCE_S) for _ in range(50)]
    assert sorted(total(call.result()) for call in calls) == list(range(1, 51)), "a step was lost, or ran twice"
    stub.ModelInfer(step(id, end=True), timeout=wire.PATIENCE_S)


def test_a_client_that_goes_away_leaves_a_sequence_that_goes_on(stub, send):
    id = next(_IDS)
    send(step(id, 5, start=True))
    stub.ModelInfer.future(step(id, 0), timeout=wire.PATIENCE_S).cancel()
    assert send(step(id, 1, end=True)) == 6


def test_metadata_hides_controls_and_states(stub):
    said = stub.ModelMetadata(pb.ModelMetadataRequest(name="steps"), timeout=wire.PATIENCE_S)
    assert [tensor.name for tensor in said.inputs] == ["x"]
    config = stub.ModelConfig(pb.ModelConfigRequest(name="steps"), timeout=wire.PATIENCE_S).config
    assert config.sequence_batching.HasField("direct")
