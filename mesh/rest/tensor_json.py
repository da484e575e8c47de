"""Tensors as JSON: lists of values to raw contents, and raw contents to lists.

Work on many values is done in slices, with an iteration of the event loop between them.
"""

from __future__ import annotations

import asyncio
import json
from itertools import chain
from typing import Any

import numpy as np
import orjson

from shoal.errors import InvalidArgument, quoted
from shoal.oip.datatypes import BY_NAME, Datatype
from shoal.oip.tensors import pack_bytes, split_bytes

# Values of one slice: 1 to 5 ms. Lists of one slice: 1 ms, and 5 ns for each of their values.
_SLICE, _SLICE_LISTS = 1 << 16, 1 << 13

_INTEGERS, _NUMBERS = frozenset({int}), frozenset({int, float})
_KINDS = {"b": frozenset({bool}), "i": _INTEGERS, "u": _INTEGERS, "f": _NUMBERS, "O": frozenset({str})}
_EXPECTED = {"b": "true and false", "i": "whole numbers", "u": "whole numbers", "f": "numbers", "O": "texts"}
BINARY_ONLY = ("FP16", "BF16")
"""Datatypes that JSON does not carry."""
_NUMPY = orjson.OPT_SERIALIZE_NUMPY


async def to_raw(data: list[Any], datatype: Datatype, elements: int, dims: int, what: str) -> bytes:
    """Return the raw contents of a tensor whose values are in `data`, nested or not, row by row.

    Raises:
        InvalidArgument: the values are not exactly `elements` of the datatype, or nested deeper than `dims`.
    """
    if datatype.name in BINARY_ONLY:
        raise InvalidArgument(
            f"receiving {datatype.name} data via JSON is not supported. Please use the binary data format for {what}"
        )
    flat = await _flattened(data, dims, what)
    if len(flat) != elements:
        raise InvalidArgument(
            f"Unable to parse 'data': Shape does not match true shape of 'data' field: {what} has {elements} elements, "
            f"got {len(flat)} values"
        )
    if len(flat) <= _SLICE:
        return packed(flat, datatype, what)
    parts = []
    for start in range(0, len(flat), _SLICE):
        parts.append(packed(flat[start : start + _SLICE], datatype, what))
        await asyncio.sleep(0)
    return b"".join(parts)


async def _flattened(data: list[Any], dims: int, what: str) -> list[Any]:
    depth = 1
    while await _has_lists(data):
        if depth >= max(dims, 1):
            raise InvalidArgument(f"Unable to parse 'data': {what} has {dims} dimensions, its values are nested deeper")
        depth += 1
        flat: list[Any] = []
        for start in range(0, len(data), _SLICE_LISTS):
            if start:
                await asyncio.sleep(0)
            flat += chain.from_iterable(
                value if type(value) is list else (value,) for value in data[start : start + _SLICE_LISTS]
            )
        data = flat
    return data


async def _has_lists(data: list[Any]) -> bool:
    for start in range(0, len(data), _SLICE):
        if start:
            await asyncio.sleep(0)
        if list in map(type, data[start : start + _SLICE]):
            return True
    return False


def packed(values: list[Any], datatype: Datatype, what: str) -> bytes:
    """Return the raw contents of a flat list. Raises InvalidArgument for a value that the datatype does not have."""
    kind = datatype.dtype.kind
    if not _KINDS[kind].issuperset(map(type, values)):
        raise InvalidArgument(f"Unable to parse 'data': {what} is {datatype.name}: expected {_EXPECTED[kind]}")
    if datatype.is_bytes:
        return pack_bytes(values)
    try:
        with np.errstate(over="ignore"):
            return np.array(values, datatype.dtype).tobytes()
    except OverflowError as err:
        raise InvalidArgument(f"Unable to parse 'data': {what}: a value is no {datatype.name}") from err


async def to_json(raw: bytes, datatype_name: str, elements: int, name: str) -> list[bytes]:
    """Return the values in raw contents as JSON: the pieces of a list, without its brackets.

    Raises:
        InvalidArgument: JSON cannot carry the values.
    """
    datatype = BY_NAME[datatype_name]
    if not raw:
        return []
    if datatype_name in BINARY_ONLY:
        raise InvalidArgument(
            f"sending {datatype_name} data via JSON is not supported. Please use the binary data format for output "
            f"{quoted(name)}"
        )
    values: Any
    if datatype.is_bytes:
        values = split_bytes(raw, elements, f"output {quoted(name)}", InvalidArgument)
    else:
        values = np.frombuffer(raw, datatype.dtype)
    pieces: list[bytes] = []
    for start in range(0, len(values), _SLICE):
        if start:
            pieces.append(b",")
            await asyncio.sleep(0)
        pieces.append(written(values[start : start + _SLICE], name))
    return pieces


def written(values: Any, name: str) -> bytes:
    """Return an array of numbers, or a list of bytes, as a JSON list without its brackets."""
    if isinstance(values, list):
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError as err:
            raise InvalidArgument(
                f"output {quoted(name)} has bytes that are no UTF-8 text, which JSON cannot carry: ask for binary data"
            ) from err
    elif values.dtype.kind == "f" and not np.isfinite(values).all():
        # As Triton: NaN, Infinity and -Infinity.
        return json.dumps(values.tolist(), separators=(",", ":"))[1:-1].encode()
    return orjson.dumps(values, option=_NUMPY)[1:-1]
