"""A tensor that stays on a GPU between two steps of an ensemble.

    step on GPU 0 ──Resident──> step on GPU 0        its rows are cut and joined there; nobody on the way can read it

Those on the way see its shape, datatype and size, as of any tensor. What would read its numbers on the host is an
error, and no copy behind anybody's back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from services.infer.requests.tensors import Tensor


class ResidentPool(Protocol):
    """A runtimes.lane.Lane: where the array is."""

    def joined(self, arrays: Sequence[Any]) -> Any:
        """The rows of several arrays there, one behind the other, in one array there."""

    def fetched(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Copies on the host; waits for them."""


class Resident:
    """An array, and where it is. Nobody writes to it."""

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
        """Some of its rows: nothing is copied."""
        if not isinstance(rows, slice):
            raise TypeError("a tensor on a GPU can be cut by rows, and no number of it be read")
        return Resident(self.array[rows], self.gpu)

    def __array__(self, *_: Any, **__: Any) -> Tensor:
        raise TypeError("this tensor is on a GPU: whoever wants its numbers must fetch it")


def is_resident(value: object) -> bool:
    """Whether it is one. To type checkers and to all that pass it on, a Resident is a tensor."""
    return isinstance(value, Resident)


def joined(parts: Sequence[Resident]) -> Resident:
    """The rows of all of them, in order. They are in one place."""
    gpu = parts[0].gpu
    return Resident(gpu.joined([part.array for part in parts]), gpu)


def fetched(values: Sequence[Any]) -> list[Any]:
    """The same values, those on a GPU as copies on the host: they are waited for once."""
    on_gpu = [value for value in values if isinstance(value, Resident)]
    if not on_gpu:
        return list(values)
    copies = iter(on_gpu[0].gpu.fetched([value.array for value in on_gpu]))
    return [next(copies) if isinstance(value, Resident) else value for value in values]
