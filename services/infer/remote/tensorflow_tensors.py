"""Conversion between TensorFlow's tensor messages and arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.infer.error_text import enumerated
from services.infer.remote.dialect import check_shape, shape_of
from services.infer.remote.wire import Pieces, raw
from services.infer.requests import tensors
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument
from shoal.oip.datatypes import BY_NAME, Datatype
from shoal.oip.tensors import count_elements, shape_text
from shoal.remote.v1 import tensorflow_serving_pb2 as pb

_NAMES: dict[pb.TensorFlowType, str] = {
    pb.DT_FLOAT: "FP32",
    pb.DT_DOUBLE: "FP64",
    pb.DT_HALF: "FP16",
    pb.DT_BFLOAT16: "BF16",
    pb.DT_INT8: "INT8",
    pb.DT_INT16: "INT16",
    pb.DT_INT32: "INT32",
    pb.DT_INT64: "INT64",
    pb.DT_UINT8: "UINT8",
    pb.DT_UINT16: "UINT16",
    pb.DT_UINT32: "UINT32",
    pb.DT_UINT64: "UINT64",
    pb.DT_BOOL: "BOOL",
    pb.DT_STRING: "BYTES",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_VALUES = {
    "FP32": "float_val",
    "FP64": "double_val",
    "FP16": "half_val",
    "BF16": "half_val",
    "INT64": "int64_val",
    "UINT32": "uint32_val",
    "UINT64": "uint64_val",
    "BOOL": "bool_val",
    "BYTES": "string_val",
}
_MAX_IMPLIED = 1 << 24

_FIELDS = pb.TensorFlowTensor.DESCRIPTOR.fields_by_name
_CONTENT, _STRINGS = _FIELDS["tensor_content"].number, _FIELDS["string_val"].number


def datatype(dtype: pb.TensorFlowType) -> Datatype | None:
    """Return the Open Inference Protocol's datatype for a TensorFlow type; None when the protocol has none."""
    return BY_NAME[_NAMES[dtype]] if dtype in _NAMES else None


def type_name(dtype: int) -> str:
    """Return the name of a TensorFlow type, for messages."""
    return enumerated(pb.TensorFlowType.DESCRIPTOR, dtype)


def to_message(arrays: Sequence[Tensor], datatype: Datatype) -> Pieces:
    """Return one tensor message with the rows of all arrays."""
    shape = pb.TensorFlowShape(dim=[pb.TensorFlowShape.Dim(size=size) for size in shape_of(arrays)])
    pieces = Pieces(pb.TensorFlowTensor(dtype=_TYPES[datatype.name], tensor_shape=shape).SerializeToString())
    if datatype.is_bytes:
        for array in arrays:
            for element in array.reshape(-1):
                pieces.add(_STRINGS, Pieces(element))
    else:
        pieces.add(_CONTENT, raw(arrays, datatype))
    return pieces


def from_message(tensor: pb.TensorFlowTensor, spec: TensorSpec, what: str) -> Tensor:
    """Return the array of a tensor message. `what` opens the message of an error.

    Raises:
        InvalidArgument: the type or shape contradicts `spec`, or the number of elements contradicts the shape.
    """
    expected = spec.datatype
    if datatype(tensor.dtype) != expected:
        raise InvalidArgument(f"{what}: expected {expected.name}, got {type_name(tensor.dtype)}")
    if tensor.tensor_shape.unknown_rank:
        raise InvalidArgument(f"{what} has no shape")
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    check_shape(shape, spec, what)
    if tensor.tensor_content and not expected.is_bytes:
        return tensors.from_raw(tensor.tensor_content, expected, shape, what)
    return _from_values(tensor, expected, shape, what)


def _from_values(tensor: pb.TensorFlowTensor, expected: Datatype, shape: tuple[int, ...], what: str) -> Tensor:
    values = getattr(tensor, _VALUES.get(expected.name, "int_val"))
    elements = count_elements(shape, what, InvalidArgument)
    # Missing values repeat the last one. The limit keeps a message of a few bytes from becoming gigabytes.
    if len(values) > elements or elements - len(values) > _MAX_IMPLIED:
        raise InvalidArgument(f"{what}: shape {shape_text(shape)} has {elements} elements, got {len(values)}")
    array = np.empty(elements, np.uint16 if expected.name in ("FP16", "BF16") else expected.dtype)
    if values and array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype.name)
        if min(values) < limits.min or max(values) > limits.max:
            raise InvalidArgument(f"{what}: a value is not one of {expected.name}")
    array[: len(values)] = values
    array[len(values) :] = values[-1] if values else b"" if expected.is_bytes else 0
    return array.view(expected.dtype).reshape(shape)
