"""Tensors of the inference protocol, to and from what JSON can say.

Format: the "data" of https://github.com/kserve/open-inference-protocol (REST): elements in row-major order, flat or
nested. Beyond JSON: "NaN", "Infinity" and "-Infinity" as texts; BYTES that are not UTF-8 as base64, with the tensor's
parameter `content_type` = `base64`.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataLoss, InvalidArgument

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
DATATYPES = (*DTYPES, "BYTES")
_LENGTH_BYTES = 4
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def check_datatype(what: str, datatype: object) -> str:
    """`datatype`, when it is one that JSON can say.

    Raises:
        InvalidArgument: it is not.
    """
    if datatype in DATATYPES:
        return str(datatype)
    raise InvalidArgument(f"{what}: datatype {datatype!r} is none of {', '.join(DATATYPES)} (others: as protobuf)")


def raw_of(what: str, datatype: str, elements: Sequence[Any], *, is_base64: bool = False) -> bytes:
    """The raw contents of a tensor with these elements, row-major.

    Raises:
        InvalidArgument: an element does not fit `datatype`; the message says which.
    """
    if datatype == "BYTES":
        return b"".join(framed(_bytes_of(what, index, element, is_base64)) for index, element in enumerate(elements))
    dtype = DTYPES[datatype]
    try:
        return np.array(
            [_number(what, index, element, dtype) for index, element in enumerate(elements)], dtype
        ).tobytes()
    except (OverflowError, ValueError, TypeError) as err:
        raise InvalidArgument(f"{what}: an element does not fit {datatype}: {err}") from None


def framed(element: bytes) -> bytes:
    """A BYTES element as raw contents have it: its length, then its bytes."""
    return len(element).to_bytes(_LENGTH_BYTES, "little") + element


def flat(what: str, data: object, depth: int = 0) -> tuple[list[Any], list[int]]:
    """The elements of nested lists in row-major order, and their shape.

    Raises:
        InvalidArgument: rows differ in length or depth, or lists lie deeper than any tensor's.
    """
    if not isinstance(data, list):
        return [data], []
    if depth > 32:
        raise InvalidArgument(f"{what}: lists lie more than 32 deep in one another")
    elements: list[Any] = []
    inner: list[int] | None = None
    for row in data:
        row_elements, shape = flat(what, row, depth + 1)
        if inner is not None and shape != inner:
            raise InvalidArgument(f"{what}: rows have the shapes {inner} and {shape}: all must have one")
        inner = shape
        elements += row_elements
    return elements, [len(data), *(inner or [])]


def elements_of(what: str, datatype: str, shape: Sequence[int], raw: bytes) -> tuple[list[Any], bool]:
    """The elements of a tensor as JSON can say them, and whether they are base64.

    Raises:
        DataLoss: the bytes do not fit datatype and shape. InvalidArgument: JSON cannot say the datatype.
    """
    check_datatype(what, datatype)
    count = math.prod(shape)
    if datatype == "BYTES":
        found = _unframed(what, raw)
        _check_count(what, count, len(found))
        return _texts(found)
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise DataLoss(f"{what}: {datatype} {list(shape)} takes {count * dtype.itemsize} bytes, got {len(raw)}")
    array: NDArray[Any] = np.frombuffer(raw, dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [_said(element) for element in array.tolist()], False
    return array.tolist(), False


def _check_count(what: str, wanted: int, found: int) -> None:
    if wanted != found:
        raise DataLoss(f"{what}: its shape takes {wanted} elements, got {found}")


def _number(what: str, index: int, element: Any, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        if isinstance(element, bool):
            return element
    elif dtype.kind in "iu":
        if isinstance(element, int) and not isinstance(element, bool):
            limits = np.iinfo(dtype)
            if limits.min <= element <= limits.max:
                return element
    elif isinstance(element, int | float) and not isinstance(element, bool):
        number = float(element)
        if not math.isfinite(number) or abs(number) <= float(np.finfo(dtype).max):
            return number
    elif isinstance(element, str) and element in _NOT_FINITE:
        return _NOT_FINITE[element]
    raise InvalidArgument(f"{what}: element {index} is {str(element)[:40]!r}, which is not {_names(dtype)}")


def _names(dtype: np.dtype[Any]) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _bytes_of(what: str, index: int, element: Any, is_base64: bool) -> bytes:
    if not isinstance(element, str):
        raise InvalidArgument(f"{what}: element {index} is {str(element)[:40]!r}: BYTES elements are texts in JSON")
    try:
        return base64.b64decode(element, validate=True) if is_base64 else element.encode()
    except (binascii.Error, ValueError) as err:
        raise InvalidArgument(f"{what}: element {index} cannot be read: {err}") from None


def _unframed(what: str, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            raise DataLoss(f"{what}: BYTES element {len(elements)} ends beyond the tensor's {len(raw)} bytes")
        elements.append(raw[start:at])
    return elements


def _texts(elements: Sequence[bytes]) -> tuple[list[Any], bool]:
    try:
        return [element.decode() for element in elements], False
    except UnicodeDecodeError:
        return [base64.b64encode(element).decode() for element in elements], True


def _said(element: float) -> float | str:
    if math.isfinite(element):
        return element
    return "NaN" if math.isnan(element) else "Infinity" if element > 0 else "-Infinity"
