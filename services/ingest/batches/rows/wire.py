"""Stacks as requests of the inference protocol, and its answers as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.batches.rows.fitting import Fitted
from services.ingest.batches.rows.signature import DTYPES, Signature, Spec
from services.ingest.batches.rows.stacking import Stack
from shoal.errors import DataLoss
from shoal.inference.v2 import inference_pb2 as oip

Array = NDArray[Any]

_CONTENTS = {
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


@dataclass(frozen=True, slots=True)
class Asked:
    """What all requests of a batch have in common."""

    model_name: str
    model_version: str
    signature: Signature
    tenant: str = ""


def request_of(asked: Asked, inputs: Sequence[Fitted], stack: Stack) -> bytes:
    """A stack as a serialised ModelInferRequest."""
    message = oip.ModelInferRequest(model_name=asked.model_name, model_version=asked.model_version)
    for fitted in inputs:
        array = fitted.stacked(stack.rows)
        if asked.signature.max_rows == 0:
            array = array[0]
        message.inputs.add(name=fitted.spec.name, datatype=fitted.spec.datatype, shape=array.shape)
        message.raw_input_contents.append(_pack(array) if fitted.spec.datatype == "BYTES" else array.tobytes())
    for output in asked.signature.outputs:
        message.outputs.add(name=output.name)
    return message.SerializeToString()


def answer_of(signature: Signature, answer: oip.ModelInferResponse, rows: int) -> Mapping[str, Array]:
    """The outputs of an answer to `rows` rows: arrays whose first dimension is the rows.

    Raises:
        DataLoss: the answer is not what the model has promised.
    """
    raw = answer.raw_output_contents
    if raw and len(raw) != len(answer.outputs):
        raise DataLoss(f"the model answered {len(answer.outputs)} outputs with {len(raw)} contents")
    found = {tensor.name: (tensor, raw[index] if raw else None) for index, tensor in enumerate(answer.outputs)}
    arrays: dict[str, Array] = {}
    for spec in signature.outputs:
        if spec.name not in found:
            raise DataLoss(f"the model answered without its output {spec.name!r}")
        array = _array(spec, *found[spec.name])
        arrays[spec.name] = _checked(spec, array if signature.max_rows else array[np.newaxis], rows)
    return arrays


def _checked(spec: Spec, array: Array, rows: int) -> Array:
    if array.ndim != len(spec.shape) + 1 or len(array) != rows:
        raise DataLoss(
            f"output {spec.name!r}: the model promises the shape {list(spec.shape)} for a row, and answered "
            f"{list(array.shape)} to {rows} rows"
        )
    return array


def _array(spec: Spec, tensor: oip.ModelInferResponse.InferOutputTensor, raw: bytes | None) -> Array:
    shape = tuple(tensor.shape)
    if tensor.datatype != spec.datatype or min(shape, default=0) < 0:
        raise DataLoss(f"output {spec.name!r}: expected {spec.datatype}, the model answered {tensor.datatype} {shape}")
    if raw is None:
        return _of_contents(spec, shape, tensor.contents)
    if spec.datatype == "BYTES":
        return _objects(spec, _unpack(spec, raw), shape)
    dtype = DTYPES[spec.datatype]
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise DataLoss(f"output {spec.name!r}: {spec.datatype} {list(shape)} in {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape)


def _of_contents(spec: Spec, shape: tuple[int, ...], contents: oip.InferTensorContents) -> Array:
    elements = list(getattr(contents, _CONTENTS.get(spec.datatype, ""), ()))
    if spec.datatype == "BYTES":
        return _objects(spec, elements, shape)
    if len(elements) != math.prod(shape):
        raise DataLoss(f"output {spec.name!r}: {spec.datatype} {list(shape)} has {len(elements)} elements")
    return np.array(elements, DTYPES[spec.datatype]).reshape(shape)


def _objects(spec: Spec, elements: list[bytes], shape: tuple[int, ...]) -> Array:
    if len(elements) != math.prod(shape):
        raise DataLoss(f"output {spec.name!r}: BYTES {list(shape)} has {len(elements)} elements")
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def _pack(array: Array) -> bytes:
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        parts += (len(element).to_bytes(4, "little"), element)
    return b"".join(parts)


def _unpack(spec: Spec, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            raise DataLoss(f"output {spec.name!r}: a BYTES element ends beyond the answer")
        elements.append(raw[start:at])
    return elements
