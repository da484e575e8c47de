"""A GPU that is the host's memory: every call of the real one, counted; results are there only once waited for.

What stays there is a `Resident`, which nobody on the host can read; copies to the host hold poison until their event
is waited for. Streams, pinned memory and pointers are not simulated.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np

from kernels.memory import Event, HostMemory
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.onnx_devices import Device
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.runtime import ExecutionPlacement, Session, SessionOptions

POISON = 0xA5


class SimulatedMemory(HostMemory):
    """GPU number 0."""

    def __init__(self) -> None:
        self.copies_in = self.copies_out = self.joins = 0
        self.under_way: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def event(self) -> Event:
        return _Mark(self)

    def join(self, arrays: Any) -> np.ndarray:
        self.joins += 1
        return super().join(arrays)

    def copy_in(self, host: np.ndarray, into: np.ndarray, stream: None) -> None:
        self.copies_in += 1
        super().copy_in(host, into, stream)

    def copy_out(self, array: np.ndarray, into: np.ndarray, stream: None) -> None:
        self.copies_out += 1
        into.view(np.uint8)[...] = POISON
        self.under_way[next(self._numbers)] = (array, into)

    def finish(self, copies: list[int]) -> None:
        """Makes those that nobody has waited for yet."""
        with self._lock:
            for number in copies:
                if copy := self.under_way.pop(number, None):
                    np.copyto(copy[1], copy[0])

    def forget(self) -> None:
        """Counts from zero."""
        self.copies_in = self.copies_out = self.joins = 0


class _Mark:
    """Waiting for it makes the copies that were under way when it was recorded."""

    def __init__(self, memory: SimulatedMemory) -> None:
        self._memory = memory
        self._recorded: list[int] = []

    def record(self, stream: None) -> None:
        self._recorded = list(self._memory.under_way)

    def synchronize(self) -> None:
        self._memory.finish(self._recorded)


def gpu_streams_of(memory: SimulatedMemory) -> GpuStreams:
    return GpuStreams(lambda: 1, lambda gpu: memory, lambda: True)


class SimulatedGpuOnnx(OnnxRuntime):
    """ONNX Runtime on the CPU, as on GPU 0 where a configuration asks for KIND_GPU; `always`: whatever it asks for."""

    def __init__(self, gpu_streams: GpuStreams, always: bool = False) -> None:
        super().__init__(gpu_streams)
        self._always = always

    def load(self, file: Path, options: SessionOptions) -> Session:
        if self._always:
            options = SessionOptions(
                1, shares_stream=True, placements=(ExecutionPlacement("gpu", 0, 2),), entries=options.entries
            )
        return super().load(file, options)

    def devices(self, options: SessionOptions) -> list[tuple[Device, int]]:
        cpu = [("CPUExecutionProvider", {})]
        return [(Device(cpu, 0 if place.kind == "gpu" else None), place.runs) for place in options.placements]


def on_simulated_gpu() -> SimulatedGpuOnnx:
    return SimulatedGpuOnnx(gpu_streams_of(SimulatedMemory()), always=True)
