"""Conversion of tensors of the inference protocol to and from JSON values.

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

from shoal.errors import InvalidArgument
from shoal.oip.datatypes import BY_NAME, DTYPES
from shoal.oip.tensors import Array, pack_bytes

DATATYPES = tuple(name for name in BY_NAME if name != "BF16")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def check_datatype(what: str, datatype: object) -> str:
    """Return `datatype` when JSON can represent it.

    Raises:
        InvalidArgument: the datatype is unknown, or has no JSON form.
    """
    if datatype in DATATYPES:
        return str(datatype)
    raise InvalidArgument(f"{what}: datatype {datatype!r} is none of {', '.join(DATATYPES)} (others: as protobuf)")


def raw_of(what: str, datatype: str, elements: Sequence[Any], *, is_base64: bool = False) -> bytes:
    """Return the raw contents of a tensor with these elements, row-major.

    Raises:
        InvalidArgument: an element does not fit `datatype`; the message names it.
    """
    if datatype == "BYTES":
        return pack_bytes(_bytes_of(what, index, element, is_base64) for index, element in enumerate(elements))
    dtype = DTYPES[datatype]
    try:
        return np.array(
            [_number(what, index, element, dtype) for index, element in enumerate(elements)], dtype
        ).tobytes()
    except (OverflowError, ValueError, TypeError) as err:
        raise InvalidArgument(f"{what}: an element does not fit {datatype}: {err}") from None


def flat(what: str, data: object, depth: int = 0) -> tuple[list[Any], list[int]]:
    """Return the elements of nested lists in row-major order, and their shape.

    Raises:
        InvalidArgument: rows differ in length or depth, or the lists are nested too deeply.
    """
    if not isinstance(data, list):
        return [data], []
    if depth > 32:
        raise InvalidArgument(f"{what}: lists are nested more than 32 deep")
    elements: list[Any] = []
    inner: list[int] | None = None
    for row in data:
        row_elements, shape = flat(what, row, depth + 1)
        if inner is not None and shape != inner:
            raise InvalidArgument(f"{what}: rows have the shapes {inner} and {shape}: all must have one")
        inner = shape
        elements += row_elements
    return elements, [len(data), *(inner or [])]


def elements_of(what: str, datatype: str, array: Array) -> tuple[list[Any], bool]:
    """Return the elements of a tensor as JSON values, row-major, and whether they are base64.

    Raises:
        InvalidArgument: the datatype has no JSON form.
    """
    check_datatype(what, datatype)
    elements = array.reshape(-1).tolist()
    if datatype == "BYTES":
        return _texts(elements)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [_json_number(element) for element in elements], False
    return elements, False


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


def _texts(elements: Sequence[bytes]) -> tuple[list[Any], bool]:
    try:
        return [element.decode() for element in elements], False
    except UnicodeDecodeError:
        return [base64.b64encode(element).decode() for element in elements], True


def _json_number(element: float) -> float | str:
    if math.isfinite(element):
        return element
    return "NaN" if math.isnan(element) else "Infinity" if element > 0 else "-Infinity"
