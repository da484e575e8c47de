"""Checks of arguments and allocation of outputs for every operation, for NumPy and CuPy arrays."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np

from kernels import backend

Shape = tuple[int | str, ...]
"""Expected shape: a number must match, a name matches any size. ("n", 4) is any number of rows of four."""

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
BOOL, INT8, INT32, INT64 = np.dtype(np.bool_), np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)


def expect(operation: str, name: str, array: Any, shape: Shape, *dtypes: np.dtype[Any]) -> None:
    """Check dtype, shape and memory order of one argument. Takes 0.5 us; a whole operation may take 2 us.

    Raises:
        TypeError: the dtype differs. Arrays are never converted implicitly, which would copy them in every call.
        ValueError: the shape differs, or the array is not C-contiguous.
    """
    if array.dtype not in dtypes:
        raise TypeError(f"{operation}: {name} must be {' or '.join(map(str, dtypes))}, not {array.dtype}")
    if array.shape != shape and not _fits(array.shape, shape):
        raise ValueError(f"{operation}: {name} must have shape [{', '.join(map(str, shape))}], not {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{operation}: {name} is not C-contiguous; ascontiguousarray copies it into that order")


def _fits(found: tuple[int, ...], expected: Shape) -> bool:
    if len(found) != len(expected):
        return False
    for size, limit in zip(found, expected, strict=True):  # noqa: SIM110 - a third of the time of all(...).
        if size != limit and type(limit) is not str:
            return False
    return True


def expect_output(operation: str, name: str, array: Any, shape: Shape, *dtypes: np.dtype[Any]) -> None:
    """Check an output array: as `expect`, and numba must be able to write the array.

    Raises:
        TypeError, ValueError: as `expect`; ValueError also when the array is read-only or not aligned.
    """
    expect(operation, name, array, shape, *dtypes)
    expect_writable(operation, name, array)


def expect_writable(operation: str, name: str, array: Any) -> None:
    """Check that numba can write an array: writable, and aligned for its dtype.

    Raises:
        ValueError: the array is read-only or not aligned.
    """
    if isinstance(array, np.ndarray) and not array.flags.behaved:
        raise ValueError(
            f"{operation}: {name} is read-only, or its address is not a multiple of its {array.itemsize} bytes"
        )


def frozen(array: Any) -> Any:
    """Return an input array for numba: read-only and aligned; a copy only when `array` is not aligned.

    numba compiles a function again for each combination of these flags. Without this view, the first request whose
    tensors are views of received bytes would wait for a compilation.
    """
    view = array.view() if array.flags.aligned else array.copy()
    view.setflags(write=False)
    return view


def empty(beside: Any, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Any = None) -> Any:
    """Return a new array on the device of `beside`.

    On a GPU the memory comes from the pool of the stream that will write it. Memory of another stream might still be in
    use.
    """
    if isinstance(beside, np.ndarray):
        return np.empty(shape, dtype)
    with stream or nullcontext():
        return importlib.import_module("cupy").empty(shape, dtype)


def at_choice(array: np.ndarray[Any, Any]) -> Any:
    """Return `array` on the device that `backend.choice` selects, for a warm-up."""
    return importlib.import_module("cupy").asarray(array) if backend.choice() == "cuda" else array
