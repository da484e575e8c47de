"""Tensors between two processes of one machine: described in a header, laid out one behind the other.

A tensor may come as several arrays with the same row shape: they are written behind each other, and arrive as one.
Every tensor starts at a multiple of 64 bytes. BYTES elements are a 4-byte little-endian length and that many bytes, as
on the wire; they arrive as `bytes`. BF16 is carried as 16-bit patterns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from shoal.oip.datatypes import BY_NAME, DTYPES
from shoal.oip.tensors import object_array, pack_bytes, split_bytes

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

ALIGNMENT = 64
"""A cache line: no kernel of NumPy wants more."""

_MAX_DIMS = 64


@dataclass(frozen=True)
class TensorPart:
    """One tensor to send."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    chunks: Sequence[Any]
    """Its bytes, in pieces."""
    size_bytes: int

    def entry(self) -> list[Any]:
        """As the header has it."""
        return [self.name, self.datatype, self.shape, self.size_bytes]


def part(name: str, datatype: str, arrays: Sequence[Tensor]) -> TensorPart:
    """The tensor made of `arrays`, one behind the other.

    Raises:
        TypeError: an element of a BYTES tensor is neither bytes nor text.
    """
    first = arrays[0]
    shape = first.shape if len(arrays) == 1 else (sum(len(array) for array in arrays), *first.shape[1:])
    if datatype == "BYTES":
        data = b"".join(pack_bytes(array.reshape(-1).tolist()) for array in arrays)
        return TensorPart(name, datatype, shape, (data,), len(data))
    plain = [_plain(array, DTYPES[datatype]) for array in arrays]
    return TensorPart(name, datatype, shape, plain, sum(array.nbytes for array in plain))


def _plain(array: Tensor, dtype: np.dtype[Any]) -> Tensor:
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    # A view as bytes: a buffer of any other format is refused by some calls, and one without dimensions by others.
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)


def laid_out(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes start, and where the last one ends."""
    starts, at = [], 0
    for size in sizes:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        starts.append(at)
        at += size
    return starts, at


def read(entries: Any, memory: memoryview) -> list[tuple[str, str, Tensor]]:
    """Name, datatype and array of each tensor that the `entries` of a header describe: views of `memory`, or BYTES.

    Raises:
        ValueError: they do not describe what `memory` holds.
    """
    if not isinstance(entries, list):
        raise ValueError("the list of tensors is none")
    for entry in entries:
        _check(entry)
    starts, end = laid_out(entry[3] for entry in entries)
    if end != len(memory):
        raise ValueError(f"{len(memory)} bytes hold tensors of {end} bytes")
    return [
        (name, datatype, _array(name, memory[start : start + size], datatype, shape))
        for (name, datatype, shape, size), start in zip(entries, starts, strict=True)
    ]


def _check(entry: Any) -> None:
    if not (isinstance(entry, list) and len(entry) == 4):
        raise ValueError("a tensor is described by a name, a datatype, a shape and a size")
    name, datatype, shape, size = entry
    if not isinstance(name, str) or not (isinstance(datatype, str) and datatype in BY_NAME):
        raise ValueError(f"a tensor of datatype {datatype!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ValueError(f"tensor '{name}' has no shape")
    if type(size) is not int or size < 0:
        raise ValueError(f"tensor '{name}' has no size")
    if datatype != "BYTES" and math.prod(shape) * DTYPES[datatype].itemsize != size:
        raise ValueError(f"tensor '{name}' of shape {shape} has {size} bytes")


def _array(name: str, memory: memoryview, datatype: str, shape: Sequence[int]) -> Tensor:
    if datatype != "BYTES":
        return np.frombuffer(memory, DTYPES[datatype]).reshape(shape)
    return object_array(split_bytes(memory, math.prod(shape), f"tensor '{name}'", ValueError), shape)
