"""One GPU of this process: its memory, and the one CUDA stream on which all work is enqueued.

    operators, copies, ONNX Runtime ──> stream ──> GPU ──event──> threads that wait for results

All models of the process share the stream. So a step's output is complete before the next step reads it, and freed
memory is reused only after its last reader, without events between steps. The price: models on one GPU run one after
the other. Any thread may enqueue work; each waits for its own.

Not yet run on a GPU: the tests use host memory with the same calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from kernels.backend import device_available, why_no_device
from kernels.memory import CudaMemory, Memory
from services.infer.requests.tensors import Tensor
from services.infer.runtimes import gpus
from shoal.errors import FailedPrecondition

_ALIGNMENT = 16


class GpuStream:
    """Memory and stream of one GPU; a `resident.ResidentPool`."""

    def __init__(self, gpu: int, memory: Memory) -> None:
        self.gpu, self.memory = gpu, memory
        self.stream = memory.stream()

    def using(self) -> AbstractContextManager[Any]:
        """Return the context in which a thread enqueues work on the stream."""
        return self.memory.using(self.stream)

    def uploaded(self, array: Tensor) -> Any:
        """Return a copy of `array` on the GPU; the caller may overwrite `array` immediately."""
        host = np.ascontiguousarray(array)
        with self.using():
            copy = self.memory.empty(host.shape, host.dtype)
            if host.size:
                self.memory.copy_in(host, copy, self.stream)
        return copy

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Return one array on the GPU with the rows of all `arrays`."""
        with self.using():
            return self.memory.join(arrays)

    def fetched(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Return copies of `arrays` in host memory. One pinned buffer holds all of them; blocks once for all copies."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        pinned = self.memory.pinned(max(sum(sizes), 1))
        copies, at = [], 0
        with self.using():
            for array, size in zip(arrays, sizes, strict=True):
                host = pinned[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
                if array.nbytes:
                    self.memory.copy_out(self.memory.contiguous(array), host, self.stream)
                copies.append(host)
                at += size
        self.wait()
        return copies

    def wait(self) -> None:
        """Block until all work enqueued so far is done. Not for an event loop."""
        with self.using():
            event = self.memory.event()
            event.record(self.stream)
        event.synchronize()


class GpuStreams:
    """The GPU streams of this process; each is created on first use."""

    def __init__(
        self,
        count: Callable[[], int] = gpus.count,
        memory: Callable[[int], Memory] = CudaMemory,
        is_usable: Callable[[], bool] = device_available,
    ) -> None:
        """Store the arguments.

        Args:
            count: returns the number of GPUs.
            memory: returns the memory of one GPU.
            is_usable: returns True when CuPy is installed and finds a GPU.
        """
        self.count, self._memory, self._is_usable = count, memory, is_usable
        self._streams: dict[int, GpuStream] = {}
        self._lock = threading.Lock()

    def of(self, gpu: int) -> GpuStream:
        """Return the stream of GPU number `gpu`. Raises FailedPrecondition when the GPU or CuPy is missing."""
        available = self.count()
        if not 0 <= gpu < available or not self._is_usable():
            why = "" if self._is_usable() else f", and {why_no_device()}"
            raise FailedPrecondition(f"GPU {gpu} does not exist: this process may use {available} GPUs{why}")
        # Several threads load models at the same time.
        with self._lock:
            if gpu not in self._streams:
                self._streams[gpu] = GpuStream(gpu, self._memory(gpu))
            return self._streams[gpu]
