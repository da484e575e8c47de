"""Requests and responses as they are on the wire, written by hand: nothing here is the server's code.

The tables repeat what the protocol says of each datatype, so that a mistake in the server's own tables shows.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub

MESSAGE_BYTES = 128 << 20
OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)
PATIENCE_S = 30
"""How long a call may take before a test gives up: no test measures it."""

CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Which field of InferTensorContents carries a datatype; FP16 and BF16 have none."""

NUMPY = {
    "BOOL": "?",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPES = (*NUMPY, "BF16", "BYTES")


@dataclass(frozen=True)
class Given:
    """One input: raw bytes, or typed values in the field `contents` (the datatype's own when not said)."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes | None = None
    values: Sequence[object] | None = None
    contents: str = ""


def packed(elements: Iterable[bytes]) -> bytes:
    """BYTES elements in their raw layout: each after its length, 4 bytes, little-endian."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpacked(raw: bytes) -> list[bytes]:
    elements, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        elements.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def floats(name: str = "x", rows: int = 1, columns: int = 4, start: float = 1) -> Given:
    """[rows, columns] FP32, counting up from `start`."""
    array = np.arange(rows * columns, dtype="<f4").reshape(rows, columns) + np.float32(start)
    return Given(name, "FP32", array.shape, array.astype("<f4").tobytes())


def request(
    model: str,
    *given: Given,
    version: str = "",
    id: str = "",
    outputs: Iterable[str] = (),
    parameters: Mapping[str, object] | None = None,
) -> pb.ModelInferRequest:
    """A ModelInferRequest; `parameters` are {name: (kind, value)} or {name: value} with the kind of its Python type."""
    made = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for tensor in given:
        sent = made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if tensor.raw is not None:
            made.raw_input_contents.append(tensor.raw)
        if tensor.values is not None:
            field = tensor.contents or CONTENTS[tensor.datatype]
            getattr(sent.contents, field).extend(tensor.values)
    for name in outputs:
        made.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        put(made.parameters[name], value)
    return made


def put(parameter: pb.InferParameter, value: object) -> None:
    """Sets a parameter: ("uint64_param", 3), or a plain bool, int, float or str."""
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    kind, plain = value if isinstance(value, tuple) else (kinds[type(value)], value)
    setattr(parameter, kind, plain)


def raw_of(response: pb.ModelInferResponse, name: str) -> tuple[str, list[int], bytes]:
    """Datatype, shape and bytes of one output."""
    index = [output.name for output in response.outputs].index(name)
    output = response.outputs[index]
    return output.datatype, list(output.shape), response.raw_output_contents[index]


def array(response: pb.ModelInferResponse, name: str) -> np.ndarray:
    """One output of numbers as an array; BYTES as objects."""
    datatype, shape, raw = raw_of(response, name)
    if datatype == "BYTES":
        elements = np.empty(len(unpacked(raw)), object)
        elements[:] = unpacked(raw)
        return elements.reshape(shape)
    return np.frombuffer(raw, NUMPY[datatype]).reshape(shape)


def status(error: grpc.RpcError) -> tuple[str, str]:
    """(code name, message) of a failed call."""
    return error.code().name, error.details() or ""


def failures(stub: GRPCInferenceServiceStub, model: str) -> int:
    """Calls of `model` that were refused, expired, failed or cancelled until now."""
    (row,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name=model), timeout=PATIENCE_S).model_stats
    return int(row.inference_stats.fail.count)


def until(is_so: Callable[[], bool], what: str) -> None:
    """Waits until `is_so()`; fails the test when that takes longer than anything does on a busy machine."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.02)
