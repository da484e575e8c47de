"""Decoupled models: any number of responses to a request, on a stream only, and the marker of the last one."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, floats, request

FINAL = "triton_final_response"
ASKS = {"triton_enable_empty_final_response": True}


def repeat(times: int, **more: object) -> pb.ModelInferRequest:
    return request("repeat", Given("times", "INT32", (1,), np.int32(times).tobytes()), **more)


def sent(stub, *asked: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    return list(stub.ModelStreamInfer(iter(asked), timeout=wire.PATIENCE_S))


def indices(responses) -> list[int]:
    return [
        int(wire.array(response.infer_response, "n")[0]) for response in responses if response.infer_response.outputs
    ]


@pytest.mark.parametrize("times", [0, 1, 5, 200])
def test_as_many_responses_as_the_model_gives(stub, times):
    responses = sent(stub, repeat(times, id="d"))
    assert indices(responses) == list(range(times))
    assert {response.infer_response.id for response in responses} <= {"d"}
    assert not any(response.infer_response.parameters[FINAL].bool_param for response in responses)


@pytest.mark.parametrize("times", [0, 1, 5])
def test_an_empty_final_response_for_who_asks(stub, times):
    *responses, last = sent(stub, repeat(times, id="d", parameters=ASKS))
    assert indices(responses) == list(range(times))
    assert not last.infer_response.outputs
    assert (last.infer_response.id, last.infer_response.parameters[FINAL].bool_param) == ("d", True)


def test_an_error_of_the_model_is_in_band(stub):
    responses = sent(stub, repeat(-1, id="bad"), repeat(2, id="good"))
    (bad,) = [response for response in responses if response.infer_response.id == "bad"]
    assert "times is below zero" in bad.error_message
    assert indices(response for response in responses if response.infer_response.id == "good") == [0, 1]


def test_beside_a_model_with_one_response(stub):
    responses = sent(stub, repeat(3, id="many"), request("double", floats(), id="one"), repeat(2, id="few"))
    by_id = {id: [a for a in responses if a.infer_response.id == id] for id in ("many", "one", "few")}
    assert (indices(by_id["many"]), indices(by_id["few"])) == ([0, 1, 2], [0, 1])
    assert [wire.array(response.infer_response, "y")[0, 0] for response in by_id["one"]] == [2]


def test_not_through_model_infer(refused):
    message = refused("UNIMPLEMENTED", repeat(1))
    assert message.startswith("ModelInfer RPC doesn't support models with decoupled transaction policy")


def test_a_bad_request_is_refused_in_band(stub):
    (response,) = sent(stub, request("repeat", floats(), id="x"))
    assert "'x'" in response.error_message
    assert response.infer_response.id == "x"


def test_a_client_that_leaves_in_the_middle(stub):
    call = stub.ModelStreamInfer(iter([repeat(1_000_000)]), timeout=wire.PATIENCE_S)
    for n in range(3):
        assert indices([next(call)]) == [n]
    call.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert wire.status(caught.value)[0] == "CANCELLED"
    # The model is free for others: it does not go on for one who left.
    assert indices(sent(stub, repeat(2))) == [0, 1]
