"""What every operation asks of its arrays, and where it makes new ones. NumPy's and CuPy's alike."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np

from kernels import backend

Shape = tuple[int | str, ...]
"""Numbers must be met, names are free: ("n", 4) is any number of rows of four."""

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
BOOL, INT8, INT32, INT64 = np.dtype(np.bool_), np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)


def expect(operation: str, name: str, array: Any, shape: Shape, *dtypes: np.dtype[Any]) -> None:
    """Checks one argument: half a microsecond, where a whole operation may take two.

    Raises:
        TypeError: another dtype. Nothing is converted behind the caller's back: it would be a copy for each call.
        ValueError: another shape, or an array that is not C-contiguous.
    """
    if array.dtype not in dtypes:
        raise TypeError(f"{operation}: {name} must be {' or '.join(map(str, dtypes))}, not {array.dtype}")
    if array.shape != shape and not _fits(array.shape, shape):
        raise ValueError(f"{operation}: {name} must have shape [{', '.join(map(str, shape))}], not {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{operation}: {name} is not C-contiguous; ascontiguousarray copies it into that order")


def _fits(found: tuple[int, ...], wanted: Shape) -> bool:
    if len(found) != len(wanted):
        return False
    for size, want in zip(found, wanted, strict=True):  # noqa: SIM110 - a third of the time of all(...).
        if size != want and type(want) is not str:
            return False
    return True


def expect_output(operation: str, name: str, array: Any, shape: Shape, *dtypes: np.dtype[Any]) -> None:
    """As `expect`, for an array that is written.

    Raises:
        TypeError, ValueError: as `expect`; ValueError as well when the array is read-only or not aligned.
    """
    expect(operation, name, array, shape, *dtypes)
    expect_writable(operation, name, array)


def expect_writable(operation: str, name: str, array: Any) -> None:
    """Checks that numba can write an array, which lies where its dtype may lie.

    Raises:
        ValueError: it is read-only or not aligned.
    """
    if isinstance(array, np.ndarray) and not array.flags.behaved:
        raise ValueError(
            f"{operation}: {name} is read-only, or does not lie at a multiple of its {array.itemsize} bytes"
        )


def frozen(array: Any) -> Any:
    """How numba gets its inputs: never writable, always aligned.

    It compiles anew for each combination, and so would the first request do whose tensors are views of received bytes.
    """
    view = array.view() if array.flags.aligned else array.copy()
    view.setflags(write=False)
    return view


def empty(beside: Any, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Any = None) -> Any:
    """A new array where `beside` is.

    On a GPU it comes from the pool of the stream that will write it: another stream's memory might still be in use.
    """
    if isinstance(beside, np.ndarray):
        return np.empty(shape, dtype)
    with stream or nullcontext():
        return importlib.import_module("cupy").empty(shape, dtype)


def at_choice(array: np.ndarray[Any, Any]) -> Any:
    """The array where `backend.choice` wants it: for warming up."""
    return importlib.import_module("cupy").asarray(array) if backend.choice() == "cuda" else array
