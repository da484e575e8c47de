"""Hostile input to every RPC of a node, through its gateway: a clear status each time, and nothing dies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from shoal.access.rpc_groups import GROUP_OF, INTERNAL
from shoal.coord.v1 import access_pb2, coord_pb2
from shoal.inference.v2 import inference_pb2
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2

pytestmark = pytest.mark.node

_ALL: list[MethodDescriptor] = [
    method
    for module in (coord_pb2, access_pb2, inference_pb2, ingest_pb2, store_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def name_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


METHODS = [method for method in _ALL if GROUP_OF[name_of(method)] != INTERNAL]
OF_SERVICES = [method for method in _ALL if GROUP_OF[name_of(method)] == INTERNAL]
# Codes that say whose fault it is. INTERNAL and UNKNOWN would blame the service for what the caller sent.
CLEAR = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.OK,
}
LIMITS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@pytest.fixture(scope="module")
def running(node: Any, onnx_models: Path) -> Iterator[Any]:
    """A node that must have the same processes at the end as at the start."""
    one = node()
    one.shoal("models", "push", str(onnx_models / "double.onnx"))
    one.shoal("models", "push", str(onnx_models / "double.onnx"), "--name", "survivor")
    before = one.pids()
    yield one
    assert one.pids() == before, f"something died:\n{one.story()}"
    answer = one.shoal("infer", "survivor", '{"x": [[1, 2, 3, 4]]}', "--json")
    assert "8.0" in answer.stdout


@pytest.fixture(scope="module")
def channel(running: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.gateway, options=LIMITS) as channel:
        yield channel


def send(channel: grpc.Channel, method: MethodDescriptor, messages: list[bytes], timeout_s: float = 20) -> Any:
    """Calls with raw bytes; the status code, and the details. A stream's answers are read until it ends or 3 came."""
    try:
        if method.client_streaming and method.server_streaming:
            answers = channel.stream_stream(name_of(method))(iter(messages), timeout=timeout_s)
        elif method.server_streaming:
            answers = channel.unary_stream(name_of(method))(messages[0], timeout=timeout_s)
        elif method.client_streaming:
            channel.stream_unary(name_of(method))(iter(messages), timeout=timeout_s)
            return grpc.StatusCode.OK, ""
        else:
            channel.unary_unary(name_of(method))(messages[0], timeout=timeout_s)
            return grpc.StatusCode.OK, ""
        for _, _ in zip(range(3), answers, strict=False):
            if method.name.startswith("Watch"):
                break
        answers.cancel()
    except grpc.RpcError as err:
        return err.code(), err.details()
    return grpc.StatusCode.OK, ""


def random_bytes(seed: int) -> bytes:
    dice = random.Random(seed)
    return dice.randbytes(dice.choice([1, 7, 64, 1000, 70_000]))


def scrambled(method: MethodDescriptor, seed: int) -> bytes:
    """A well-formed message of the method's type whose fields hold odd values."""
    dice = random.Random(seed)
    message = method.input_type._concrete_class()
    fill(message, dice, depth=0)
    data: bytes = message.SerializeToString()
    return data


def fill(message: Any, dice: random.Random, depth: int) -> None:
    texts = ["", "\0", "../../etc/passwd", "x" * 5000, "äöü\u202e", "double", "-1", "9" * 40, "a/b", " "]
    numbers = [0, 1, -1, 2**31 - 1, -(2**31), 7, 10**6]
    for field in message.DESCRIPTOR.fields:
        if dice.random() < 0.3 or depth > 4:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            continue
        values: Any
        if field.message_type:
            targets = [getattr(message, field.name).add() for _ in range(2)] if field.is_repeated else None
            for target in targets or [getattr(message, field.name)]:
                fill(target, dice, depth + 1)
                target.SetInParent()
            continue
        if field.enum_type:
            values = [number.number for number in field.enum_type.values]
        elif field.type == field.TYPE_STRING:
            values = texts
        elif field.type == field.TYPE_BYTES:
            values = [b"", b"\xff" * 9, b"\0" * 16]
        elif field.type == field.TYPE_BOOL:
            values = [True, False]
        elif field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
            values = [0.0, float("nan"), float("inf"), -1.5]
        elif field.type in (field.TYPE_UINT32, field.TYPE_UINT64):
            values = [abs(number) for number in numbers]
        else:
            values = [*numbers, 2**63 - 1, -(2**63)] if field.type == field.TYPE_INT64 else numbers
        if field.is_repeated:
            getattr(message, field.name).extend(dice.choices(values, k=3))
        else:
            setattr(message, field.name, dice.choice(values))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_bytes_that_are_no_message(channel: grpc.Channel, method: MethodDescriptor) -> None:
    for seed in range(5):
        code, details = send(channel, method, [b"\xff" + random_bytes(seed)])
        assert code in CLEAR - {grpc.StatusCode.OK} or method.server_streaming, (code, details)
        assert code in CLEAR, (code, details)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_messages_full_of_nonsense(channel: grpc.Channel, method: MethodDescriptor) -> None:
    for seed in range(12):
        code, details = send(channel, method, [scrambled(method, seed), scrambled(method, seed + 1000)])
        # Nobody may lead for a moment, and a watch of nothing may outlast its deadline: both are clear.
        assert code in CLEAR | {grpc.StatusCode.DEADLINE_EXCEEDED} or _is_unknown_model(details), (seed, code, details)
        assert code is grpc.StatusCode.OK or details, (seed, code)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_nothing_at_all(channel: grpc.Channel, method: MethodDescriptor) -> None:
    code, details = send(channel, method, [b""])
    assert code in CLEAR or _is_unknown_model(details), (code, details)


def _is_unknown_model(details: str) -> bool:
    """Loading a model that is not there is INTERNAL in the protocol, as Triton has it."""
    return details.startswith("failed to load '")


def tensor_of(size: int) -> inference_pb2.ModelInferRequest:
    request = inference_pb2.ModelInferRequest(model_name="double")
    request.inputs.add(name="x", datatype="FP32", shape=[size // 16, 4])
    request.raw_input_contents.append(np.zeros(size // 4, np.float32).tobytes())
    return request


# Made by the test that sends them: each worker of a run imports this file.
BIG: dict[str, tuple[str, Callable[[], Message]]] = {
    "a tensor of 100 MB": ("ModelInfer", lambda: tensor_of(100 << 20)),
    "a job of 100 MB": ("Submit", lambda: ingest_pb2.SubmitRequest(request=tensor_of(100 << 20))),
    "a chunk of 100 MB": ("PutArtifact", lambda: store_pb2.PutArtifactRequest(chunk=bytes(100 << 20))),
    "a name of 100 MB": ("GetJob", lambda: ingest_pb2.GetJobRequest(id="x" * (100 << 20))),
    "an instance's name of 100 MB": ("DrainInstance", lambda: coord_pb2.DrainInstanceRequest(name="x" * (100 << 20))),
    "a model's name of 100 MB": (
        "RegisterModel",
        lambda: store_pb2.RegisterModelRequest(model=store_pb2.ModelVersion(name="x" * (100 << 20))),
    ),
    "a message of 140 MB": ("ModelInfer", lambda: tensor_of(140 << 20)),
}


@pytest.mark.parametrize("method", OF_SERVICES, ids=lambda method: method.full_name)
def test_methods_that_only_services_call_do_not_exist_at_the_gateway(
    channel: grpc.Channel, method: MethodDescriptor
) -> None:
    for messages in ([scrambled(method, 1)], [bytes(10 << 20)]):
        code, _ = send(channel, method, messages)
        assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("case", BIG)
def test_messages_of_a_hundred_megabytes(channel: grpc.Channel, case: str) -> None:
    name, make = BIG[case]
    method = next(method for method in METHODS if method.name == name)
    code, details = send(channel, method, [make().SerializeToString()], timeout_s=60)
    assert code in CLEAR - {grpc.StatusCode.OK}, (code, details)
    assert details


def test_a_call_that_nobody_serves(channel: grpc.Channel) -> None:
    for path in ("/shoal.store.v1.StoreService/Nope", "/no.such.Service/Call"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", timeout=30)
        assert caught.value.code() in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND}
