"""Memory layout of tensors between two processes of one machine; a header has their descriptions.

The sender may give a tensor as several arrays with the same row shape; the receiver gets one array. Every tensor starts
at a multiple of 64 bytes. A BYTES element is a 4-byte little-endian length and that many bytes, as on the wire; the
receiver gets `bytes`. BF16 is carried as 16-bit patterns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from shoal.oip.datatypes import BY_NAME, DTYPES
from shoal.oip.limits import MAX_DIMS
from shoal.oip.tensors import object_array, pack_bytes, split_bytes

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

ALIGNMENT = 64
"""One cache line: no kernel of NumPy needs more."""


@dataclass(frozen=True)
class TensorPart:
    """One tensor to send."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    chunks: Sequence[Any]
    """The tensor's bytes, in one or several buffers."""
    size_bytes: int

    def entry(self) -> list[Any]:
        """Return the description of the tensor for the header."""
        return [self.name, self.datatype, self.shape, self.size_bytes]


def part(name: str, datatype: str, arrays: Sequence[Tensor]) -> TensorPart:
    """Return the tensor that concatenates `arrays` by rows.

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
    # A flat view as bytes: some calls reject buffers of another format, others reject buffers without dimensions.
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Return the start of each tensor, given the sizes of the tensors, and the end of the last one."""
    starts, at = [], 0
    for size in sizes:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        starts.append(at)
        at += size
    return starts, at


def read(entries: Any, memory: memoryview) -> list[tuple[str, str, Tensor]]:
    """Return name, datatype and array of each tensor in `entries`. The arrays are views of `memory`, except for BYTES.

    Raises:
        ValueError: the entries do not match `memory`.
    """
    if not isinstance(entries, list):
        raise ValueError("the header has no list of tensors")
    for entry in entries:
        _check(entry)
    starts, end = layout(entry[3] for entry in entries)
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
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ValueError(f"tensor '{name}' has no shape")
    if type(size) is not int or size < 0:
        raise ValueError(f"tensor '{name}' has no size")
    if datatype != "BYTES" and math.prod(shape) * DTYPES[datatype].itemsize != size:
        raise ValueError(f"tensor '{name}' of shape {shape} has {size} bytes")


def _array(name: str, memory: memoryview, datatype: str, shape: Sequence[int]) -> Tensor:
    if datatype != "BYTES":
        return np.frombuffer(memory, DTYPES[datatype]).reshape(shape)
    return object_array(split_bytes(memory, math.prod(shape), f"tensor '{name}'", ValueError), shape)
