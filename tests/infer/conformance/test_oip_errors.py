"""Every mistake of a ModelInfer: its status, and what the message must name. In unary form and on a stream."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, floats, request


def both() -> pb.ModelInferRequest:
    made = request("double", floats())
    made.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    return made


INDEX = Given("i", "INT64", (1, 1), np.int64(9).tobytes())
CASES: dict[str, tuple[pb.ModelInferRequest, str, list[str]]] = {
    "unknown model": (request("nope", floats()), "NOT_FOUND", ["Request for unknown model: 'nope' is not found"]),
    "no model": (pb.ModelInferRequest(), "NOT_FOUND", ["Request for unknown model: '' is not found"]),
    "unknown version": (request("double", floats(), version="7"), "NOT_FOUND", ["'double' version 7 is not found"]),
    "version no integer": (
        request("double", floats(), version="abc"),
        "INVALID_ARGUMENT",
        ["failed to get model version from specified version string 'abc'"],
    ),
    "version 0": (request("double", floats(), version="0"), "INVALID_ARGUMENT", ["'0'"]),
    "unknown input": (request("double", floats("z")), "INVALID_ARGUMENT", ["'z'", "'x'", "'double'"]),
    "unknown beside known": (request("double", floats(), floats("z")), "INVALID_ARGUMENT", ["'z'"]),
    "no inputs": (request("double"), "INVALID_ARGUMENT", ["'x'", "'double'"]),
    "missing input": (request("add", floats("a")), "INVALID_ARGUMENT", ["'b'", "'add'"]),
    "input twice": (request("double", floats(), floats()), "INVALID_ARGUMENT", ["'x'"]),
    "wrong dtype": (
        request("double", Given("x", "FP64", (1, 4), b"\0" * 32)),
        "INVALID_ARGUMENT",
        ["'x'", "FP32", "FP64"],
    ),
    "no dtype": (request("double", Given("x", "", (1, 4), b"\0" * 16)), "INVALID_ARGUMENT", ["'x'", "FP32"]),
    "no such dtype": (request("double", Given("x", "fp32", (1, 4), b"\0" * 16)), "INVALID_ARGUMENT", ["'x'", "fp32"]),
    "wrong shape": (request("double", floats(columns=5)), "INVALID_ARGUMENT", ["'x'", "4", "5"]),
    "no shape": (request("double", Given("x", "FP32", (), b"\0" * 4)), "INVALID_ARGUMENT", ["'x'"]),
    "no batch dimension": (request("double", Given("x", "FP32", (4,), b"\0" * 16)), "INVALID_ARGUMENT", ["'x'"]),
    "byte size mismatch": (request("double", Given("x", "FP32", (1, 4), b"\0" * 15)), "INVALID_ARGUMENT", ["16", "15"]),
    "raw and contents": (both(), "INVALID_ARGUMENT", ["'x'"]),
    "no data": (request("double", Given("x", "FP32", (1, 4))), "INVALID_ARGUMENT", ["'x'"]),
    "unknown output": (request("double", floats(), outputs=["nope"]), "INVALID_ARGUMENT", ["'nope'", "'y'"]),
    "output twice": (request("double", floats(), outputs=["y", "y"]), "INVALID_ARGUMENT", ["'y'"]),
    "batch over max": (request("double", floats(rows=9)), "INVALID_ARGUMENT", ["9", "8", "'double'"]),
    "no rows": (request("double", Given("x", "FP32", (0, 4), b"")), "INVALID_ARGUMENT", ["'x'", "0"]),
    "rows that differ": (request("add", floats("a", rows=2), floats("b", rows=3)), "INVALID_ARGUMENT", ["2", "3"]),
    "wrong parameter type": (
        request("double", floats(), parameters={"timeout": "soon"}),
        "INVALID_ARGUMENT",
        ["'timeout'", "int64_param", "string_param"],
    ),
    "reserved parameter": (
        request("double", floats(), parameters={"triton_secret": 1}),
        "INVALID_ARGUMENT",
        ["'triton_secret'", "reserved"],
    ),
    "the model raised": (
        request("lookup", INDEX),
        "INTERNAL",
        ["Failed to process the request(s) for model", "lookup"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_unary(refused, case):
    asked, code, named = CASES[case]
    message = refused(code, asked)
    assert not [name for name in named if name not in message], message


def test_on_a_stream_each_ends_in_band_and_in_order(stub):
    """A good request between any two bad ones: it gets its response, whatever came before it."""
    asked = []
    for n, (made, _, _) in enumerate(CASES.values()):
        wrong = pb.ModelInferRequest()
        wrong.CopyFrom(made)
        wrong.id = f"wrong-{n}"
        asked += [wrong, request("double", floats(start=n), id=f"right-{n}")]
    responses = list(stub.ModelStreamInfer(iter(asked), timeout=wire.PATIENCE_S))
    assert len(responses) == len(asked)
    for n, (case, (_, _, named)) in enumerate(CASES.items()):
        wrong, right = responses[2 * n : 2 * n + 2]
        assert wrong.infer_response.id == f"wrong-{n}"
        assert not [name for name in named if name not in wrong.error_message], (case, wrong.error_message)
        assert not wrong.infer_response.outputs
        assert (right.error_message, right.infer_response.id) == ("", f"right-{n}")
        assert wire.array(right.infer_response, "y")[0].tolist() == [2 * (n + k) for k in range(4)]


@pytest.mark.parametrize("length", [200, 5000, 100_000])
def test_a_name_of_any_length_does_not_break_the_status(refused, length):
    """A message travels in a header: one that is too long would end the call with a fault of the transport."""
    long = "n" * length
    assert "'nnn" in refused("NOT_FOUND", request(long, floats()))
    assert "'nnn" in refused("INVALID_ARGUMENT", request("double", floats(long)))
    assert "'nnn" in refused("INVALID_ARGUMENT", request("double", floats(), outputs=[long]))
    assert refused("INVALID_ARGUMENT", request("double", floats(), version=long))
    assert refused("INVALID_ARGUMENT", request("double", Given("x", long, (1, 4), b"\0" * 16)))


@pytest.mark.parametrize("name", ["ünïcödé", "line\nbreak", "nul\0", "100%", "\x7f\r\n\r\n"])
def test_a_name_of_any_characters_is_said_as_it_is(refused, name):
    assert f"'{name}'" in refused("NOT_FOUND", request(name, floats()))


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "RepositoryIndex", "ServerLive"])
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff", b"\x0a\x05ab", b"\x08\x01\x0b", b"\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_message(channel, method, data):
    if method == "ServerLive" and data == b"\x0a\x02\xff\xfe":
        return  # It has no field 1: to it these are the bytes of a field that it does not know.
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(data, timeout=wire.PATIENCE_S)
    assert wire.status(caught.value)[0] == "INVALID_ARGUMENT"
