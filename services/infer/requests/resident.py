"""Resident tensors: tensors that stay on a GPU between two steps of an ensemble.

    step on GPU 0 ──Resident──> step on GPU 0        its rows are cut and joined on the GPU, and not read by the host

Code between the steps sees shape, datatype and size, as of any tensor. Reading the numbers on the host is an error, so
that no copy is made by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from services.infer.requests.tensors import Tensor


class ResidentPool(Protocol):
    """Memory of one GPU; implemented by `runtimes.gpu_stream.GpuStream`."""

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Return the rows of several arrays on the GPU in one array on the GPU, in order."""

    def fetched(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Return copies on the host; waits until they are complete."""


class Resident:
    """An array with the GPU that holds it. Read-only."""

    __slots__ = ("array", "gpu")

    def __init__(self, array: Any, gpu: ResidentPool) -> None:
        self.array, self.gpu = array, gpu

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        return len(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.array.dtype
        return dtype

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def __getitem__(self, rows: slice) -> Resident:
        """Return some of the rows; copies nothing."""
        if not isinstance(rows, slice):
            raise TypeError("a tensor on a GPU supports slices of rows only: its numbers cannot be read")
        return Resident(self.array[rows], self.gpu)

    def __array__(self, *_: Any, **__: Any) -> Tensor:
        raise TypeError("this tensor is on a GPU: call `fetched` to read its numbers on the host")


def is_resident(value: object) -> bool:
    """Return True for a Resident. To type checkers and to code that forwards it, a Resident is a tensor."""
    return isinstance(value, Resident)


def joined(parts: Sequence[Resident]) -> Resident:
    """Return the rows of all parts in order; all are on one GPU."""
    gpu = parts[0].gpu
    return Resident(gpu.joined([part.array for part in parts]), gpu)


def fetched(values: Sequence[Any]) -> list[Any]:
    """Return the same values, with copies on the host of those on a GPU; waits for the GPU once."""
    on_gpu = [value for value in values if isinstance(value, Resident)]
    if not on_gpu:
        return list(values)
    copies = iter(on_gpu[0].gpu.fetched([value.array for value in on_gpu]))
    return [next(copies) if isinstance(value, Resident) else value for value in values]
