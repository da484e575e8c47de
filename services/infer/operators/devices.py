"""Where an operation computes: on the host, or on a GPU. The arrays' place says which version of a kernel runs.

    host arrays ──put──> kernel ──give──> Resident: for the next step there, or fetched by the session
    Residents ────put──┘        └──get──> host arrays

On the host nothing is copied, and nothing is a Resident.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import numpy as np

from services.infer.requests.ragged import Value
from services.infer.requests.resident import Resident, is_resident
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.gpu_stream import GpuStream


class DeviceSlot(Protocol):
    """The host, or a GPU. What it is given and gives is used within `computing`."""

    @property
    def gpus(self) -> tuple[int, ...]: ...

    @property
    def lane(self) -> GpuStream | None:
        """None: the host."""

    def computing(self) -> AbstractContextManager[Any]:
        """Around all that is done there, on the thread that does it: which GPU is meant is said for each thread."""

    def put(self, array: Value) -> Any:
        """The tensor where the kernel wants it, contiguous."""

    def give(self, array: Any) -> Value:
        """A result as it is passed on."""

    def get(self, array: Any) -> Tensor:
        """A result on the host. Waits for what computes it."""


class Host:
    """Nothing is copied."""

    gpus: tuple[int, ...] = ()
    lane: GpuStream | None = None

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def put(self, array: Value) -> Any:
        return np.ascontiguousarray(array)

    def give(self, array: Any) -> Value:
        result: Tensor = array
        return result

    def get(self, array: Any) -> Tensor:
        result: Tensor = array
        return result


class Gpu:
    """A lane."""

    def __init__(self, lane: GpuStream) -> None:
        self.lane: GpuStream | None = lane
        self._lane = lane
        self.gpus: tuple[int, ...] = (lane.gpu,)

    def computing(self) -> AbstractContextManager[Any]:
        return self._lane.using()

    def put(self, array: Value) -> Any:
        if is_resident(array):
            return self._lane.memory.contiguous(cast("Resident", array).array)
        return self._lane.uploaded(np.asarray(array))

    def give(self, array: Any) -> Value:
        # To all that pass it on it is a tensor: it has a shape, a datatype and rows.
        return cast("Tensor", Resident(array, self._lane))

    def get(self, array: Any) -> Tensor:
        return self._lane.fetched([array])[0]
