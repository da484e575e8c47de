"""Datatypes of `triton_python_backend_utils` by number, configuration name and NumPy type; its error classes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from shoal.oip.datatypes import TABLE
from shoal.oip.tensors import object_array, pack_bytes

# NumPy has no bfloat16, and Triton's own tables leave it out.
_WITH_DTYPE = [datatype for datatype in TABLE if datatype.name != "BF16"]

TRITON_TO_NUMPY_TYPE: dict[int, Any] = {datatype.number: datatype.dtype.type for datatype in _WITH_DTYPE}

NUMPY_TO_TRITON_TYPE: dict[Any, int] = {kind: number for number, kind in TRITON_TO_NUMPY_TYPE.items()}
NUMPY_TO_TRITON_TYPE[np.bytes_] = 13

TRITON_STRING_TO_NUMPY: dict[str, Any] = {datatype.config_name: datatype.dtype.type for datatype in _WITH_DTYPE}


def triton_to_numpy_type(data_type: int) -> Any:
    return TRITON_TO_NUMPY_TYPE[data_type]


def numpy_to_triton_type(data_type: Any) -> int:
    return NUMPY_TO_TRITON_TYPE[data_type if data_type in NUMPY_TO_TRITON_TYPE else np.dtype(data_type).type]


def triton_string_to_numpy(triton_type_string: str) -> Any:
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def serialize_byte_tensor(input_tensor: Any) -> Any:
    """Return the elements, each after its 4-byte length; `()` when there are no elements."""
    array = np.asarray(input_tensor)
    if array.size == 0:
        return ()
    if array.dtype.kind not in "OSU":
        raise TritonModelException(f"cannot serialize {array.dtype}: expected an array of bytes or str")
    return pack_bytes(e if isinstance(e, bytes) else str(e) for e in array.reshape(-1).tolist())


def deserialize_bytes_tensor(encoded_tensor: Any) -> Any:
    """Return a flat array of the byte strings that `serialize_byte_tensor` has serialized."""
    data, at, elements = bytes(encoded_tensor), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        elements.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return object_array(elements, (len(elements),))


class TritonModelException(Exception):
    """`pb_utils.TritonModelException`: an exception raised by a model or by this interface."""


class TritonError:
    """`pb_utils.TritonError`: an error that takes the place of a response."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = str(message)
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


STATUS_OF = {
    TritonError.UNKNOWN: "UNKNOWN",
    TritonError.INTERNAL: "INTERNAL",
    TritonError.NOT_FOUND: "NOT_FOUND",
    TritonError.INVALID_ARG: "INVALID_ARGUMENT",
    TritonError.UNAVAILABLE: "UNAVAILABLE",
    TritonError.UNSUPPORTED: "UNIMPLEMENTED",
    TritonError.ALREADY_EXISTS: "ALREADY_EXISTS",
    TritonError.CANCELLED: "CANCELLED",
}
"""The status that a caller receives."""

CODE_OF = {status: code for code, status in STATUS_OF.items()}
