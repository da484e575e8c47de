"""One GPU as this process uses it: its memory, and the one stream that all of its work is put on.

    operations, copies, ONNX Runtime ──> stream ──> GPU ──event──> whoever waits for a result

One stream for all models of the process: what a step leaves is there before the next one reads it, and memory that is
given back is used again only behind whoever read it, with no event between steps. What it costs: models on one GPU run
one after the other. Any thread may put work there; each waits for its own.

Never run on a GPU so far: tests run it on the host's memory, where every call is the same.
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
    """A `resident.Keeper`."""

    def __init__(self, gpu: int, memory: Memory) -> None:
        self.gpu, self.memory = gpu, memory
        self.stream = memory.stream()

    def using(self) -> AbstractContextManager[Any]:
        """Around all that is put there, on the thread that does it."""
        return self.memory.using(self.stream)

    def uploaded(self, array: Tensor) -> Any:
        """A copy there, of memory that may be written again at once."""
        host = np.ascontiguousarray(array)
        with self.using():
            there = self.memory.empty(host.shape, host.dtype)
            if host.size:
                self.memory.copy_in(host, there, self.stream)
        return there

    def joined(self, arrays: Sequence[Any]) -> Any:
        with self.using():
            return self.memory.join(arrays)

    def fetched(self, arrays: Sequence[Any]) -> list[Tensor]:
        """All of them in one pinned buffer, and one wait."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        pinned = self.memory.pinned(max(sum(sizes), 1))
        found, at = [], 0
        with self.using():
            for array, size in zip(arrays, sizes, strict=True):
                host = pinned[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
                if array.nbytes:
                    self.memory.copy_out(self.memory.contiguous(array), host, self.stream)
                found.append(host)
                at += size
        self.wait()
        return found

    def wait(self) -> None:
        """Until all that was put there so far is done. Sleeps; not for an event loop."""
        with self.using():
            event = self.memory.event()
            event.record(self.stream)
        event.synchronize()


class GpuStreams:
    """The lanes of this process, each made when it is first asked for."""

    def __init__(
        self,
        count: Callable[[], int] = gpus.count,
        memory: Callable[[int], Memory] = CudaMemory,
        is_usable: Callable[[], bool] = device_available,
    ) -> None:
        """
        Args:
            count: how many GPUs there are.
            memory: of one of them.
            is_usable: whether CuPy is there and sees them.
        """
        self.count, self._memory, self._is_usable = count, memory, is_usable
        self._made: dict[int, GpuStream] = {}
        self._lock = threading.Lock()

    def of(self, gpu: int) -> GpuStream:
        """The lane of GPU number `gpu`. Raises FailedPrecondition when it is not there, or CuPy is not."""
        there = self.count()
        if not 0 <= gpu < there or not self._is_usable():
            why = "" if self._is_usable() else f", and {why_no_device()}"
            raise FailedPrecondition(f"GPU {gpu} is not there: this process may use {there} GPUs{why}")
        with self._lock:  # Models are loaded side by side.
            if gpu not in self._made:
                self._made[gpu] = GpuStream(gpu, self._memory(gpu))
            return self._made[gpu]
