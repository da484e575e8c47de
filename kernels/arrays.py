"""What every operation asks of its arrays, and where it makes new ones. NumPy's and CuPy's alike."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np

from kernels import backend

Shape = tuple[int | str, ...]
"""Numbers must be met, names are free: (n, "m") is n rows of any length."""


def expect(operation: str, name: str, array: Any, shape: Shape, *dtypes: str) -> None:
    """Checks one argument.

    Raises:
        TypeError: another dtype. Nothing is converted behind the caller's back: it would be a copy for each call.
        ValueError: another shape, or an array that is not C-contiguous.
    """
    if array.dtype.name not in dtypes:
        raise TypeError(f"{operation}: {name} must be {' or '.join(dtypes)}, not {array.dtype}")
    if array.ndim != len(shape) or any(
        wanted != size for wanted, size in zip(shape, array.shape, strict=True) if not isinstance(wanted, str)
    ):
        wanted_shape = ", ".join(map(str, shape))
        raise ValueError(f"{operation}: {name} must have shape [{wanted_shape}], not {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{operation}: {name} is not C-contiguous; ascontiguousarray copies it into that order")


def expect_output(operation: str, name: str, array: Any, shape: Shape, *dtypes: str) -> None:
    """As `expect`, for an array that is written.

    Raises:
        TypeError, ValueError: as `expect`; ValueError as well when the array is read-only.
    """
    expect(operation, name, array, shape, *dtypes)
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{operation}: {name} is read-only")


def empty(beside: Any, shape: tuple[int, ...], dtype: str, stream: Any = None) -> Any:
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
