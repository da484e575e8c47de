"""Devices of operations: the host, or one GPU. The arrays' device selects the version of a kernel.

    host arrays ──to_device──> kernel ──to_value──> Resident: for the next step on the GPU, or fetched by the session
    Residents ────to_device──┘        └──to_host──> host arrays

On the host, arrays are passed on without a copy, and without a Resident.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import numpy as np

from services.infer.requests.ragged import Value
from services.infer.requests.resident import Resident, is_resident
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.gpu_stream import GpuStream


class OperationDevice(Protocol):
    """The host, or one GPU. All methods but `computing` are called within `computing`."""

    @property
    def gpus(self) -> tuple[int, ...]: ...

    @property
    def stream(self) -> GpuStream | None:
        """The GPU's stream; None: the host."""

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context for all work on the device. Entered on the working thread: CUDA's device is per thread."""

    def to_device(self, array: Value) -> Any:
        """Return the tensor on the device, contiguous, as a kernel needs it."""

    def to_value(self, array: Any) -> Value:
        """Return a kernel's result as an output value: it stays on the device."""

    def to_host(self, array: Any) -> Tensor:
        """Return a kernel's result on the host. Waits for the kernel."""


class Host:
    """The host: arrays are passed on without a copy."""

    gpus: tuple[int, ...] = ()
    stream: GpuStream | None = None

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def to_device(self, array: Value) -> Any:
        return np.ascontiguousarray(array)

    def to_value(self, array: Any) -> Value:
        result: Tensor = array
        return result

    def to_host(self, array: Any) -> Tensor:
        result: Tensor = array
        return result


class Gpu:
    """One GPU, used through its stream."""

    def __init__(self, stream: GpuStream) -> None:
        self.stream: GpuStream | None = stream
        self._stream = stream
        self.gpus: tuple[int, ...] = (stream.gpu,)

    def computing(self) -> AbstractContextManager[Any]:
        return self._stream.using()

    def to_device(self, array: Value) -> Any:
        if is_resident(array):
            return self._stream.memory.contiguous(cast("Resident", array).array)
        return self._stream.uploaded(np.asarray(array))

    def to_value(self, array: Any) -> Value:
        # A Resident has a shape, a datatype and rows: code that only passes it on treats it as a tensor.
        return cast("Tensor", Resident(array, self._stream))

    def to_host(self, array: Any) -> Tensor:
        return self._stream.fetched([array])[0]
