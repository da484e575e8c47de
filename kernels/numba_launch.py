"""Launches of numba.cuda kernels on CuPy's arrays and streams, with nothing that waits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from numba import cuda

from kernels.backend import on_device

Extent = tuple[int, int]
MOST_BLOCKS_Y = 65535
"""A launch has no more in its second dimension: kernels go on by that many rows."""


def launch(kernel: Any, grid: Extent, block: Extent, args: Sequence[Any], stream: Any = None) -> None:
    """Puts one launch on `stream`, a `cupy.cuda.Stream`, or on CuPy's current one."""
    kernel[grid, block, stream_of(stream)](*(view(arg) for arg in args))


def view(arg: Any) -> Any:
    """numba's view of a CuPy array. Left to itself, numba waits for the stream that an array comes with."""
    return cuda.as_cuda_array(arg, sync=False) if on_device(arg) else arg


def stream_of(stream: Any) -> Any:
    """numba's name for a CuPy stream."""
    current = stream or importlib.import_module("cupy").cuda.get_current_stream()
    return cuda.external_stream(current.ptr)


def covering(shape: Extent, threads: int) -> tuple[Extent, Extent]:
    """Grid and block for one thread per element of a matrix, a row of threads along its columns."""
    rows, columns = shape
    return (-(-columns // threads), min(rows, MOST_BLOCKS_Y)), (threads, 1)
