"""Asynchronous launches of numba.cuda kernels on CuPy's arrays and streams."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from numba import cuda

from kernels.backend import on_device

Extent = tuple[int, int]
MOST_BLOCKS_Y = 65535
"""Limit of a grid's second dimension. Kernels loop over more rows in steps of this size."""


def launch(kernel: Any, grid: Extent, block: Extent, args: Sequence[Any], stream: Any = None) -> None:
    """Enqueue one launch on `stream`, a `cupy.cuda.Stream`, or on CuPy's current stream."""
    kernel[grid, block, stream_of(stream)](*(view(arg) for arg in args))


def view(arg: Any) -> Any:
    """Return numba's view of a CuPy array. By default numba would wait for the array's stream."""
    return cuda.as_cuda_array(arg, sync=False) if on_device(arg) else arg


def stream_of(stream: Any) -> Any:
    """Return numba's stream object for a CuPy stream."""
    current = stream or importlib.import_module("cupy").cuda.get_current_stream()
    return cuda.external_stream(current.ptr)


def covering(shape: Extent, threads: int) -> tuple[Extent, Extent]:
    """Return grid and block for one thread per element of a matrix, with the threads of a block along the columns."""
    rows, columns = shape
    return (-(-columns // threads), min(rows, MOST_BLOCKS_Y)), (threads, 1)
