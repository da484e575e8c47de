"""ONNX Runtime on a shared GPU stream: one copy to the GPU, the model, copies to the host, and one wait at the end.

    rows of each request ──written once──> pinned slot ──one copy──> GPU ──> model ──> outputs ──> pinned ──> host
    residents ───────────────────────────joined on the GPU────────────┘        └── outputs kept on the GPU: residents

ONNX Runtime uses the shared stream (`user_compute_stream`) and device pointers (IOBinding). Each run ends with a wait,
even when all outputs stay on the GPU: queues and deadlines need the true execution time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from kernels.stack_rows import stack_rows
from kernels.staging import Ring, Slot
from services.infer.requests.resident import Resident, joined
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.gpu_stream import GpuStream
from services.infer.runtimes.onnx_session import OnnxSession, plain
from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import FailedPrecondition

# A larger batch gets a slot of its own, which is freed afterwards: a ring keeps its memory pinned for ever.
_LARGEST_SLOT = 64 << 20
# Longest wait for a free slot.
_SLOT_S = 60.0
_WITHOUT_WAITING = "disable_synchronize_execution_providers"


class GpuStreamSession(OnnxSession):
    """One model on one GPU."""

    def __init__(self, session: Any, run_entries: Mapping[str, str], gpu_stream: GpuStream, runs: int) -> None:
        """`runs`: concurrent executions. Raises FailedPrecondition when a tensor has the datatype BYTES or BF16."""
        super().__init__(session, {**run_entries, _WITHOUT_WAITING: "1"}, gpu_stream.gpu)
        self.gpu_stream = self._gpu_stream = gpu_stream
        if unsupported := [spec for spec in self.specs if spec.datatype.is_bytes or spec.datatype.name == "BF16"]:
            spec = unsupported[0]
            raise FailedPrecondition(
                f"parameter gpu_stream 'shared': tensor '{spec.name}' is {spec.datatype.name}, "
                "only numbers are supported: use 'own'"
            )
        self._staging = _Staging(gpu_stream, runs + 1)
        # A session with `user_compute_stream` must not be run by two threads at the same time.
        self._one_at_a_time = threading.Lock()

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        return self.run_parts({name: [array] for name, array in inputs.items()}, outputs)

    def run_parts(
        self, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str], stay: Collection[str] = ()
    ) -> list[Any]:
        on_host = {name: parts for name, parts in inputs.items() if not isinstance(parts[0], Resident)}
        with self._staging.slot(on_host) as slot:
            staged = self._stage(slot, on_host)
            with self._gpu_stream.using():
                on_gpu = self._copy_in(slot, staged)
                on_gpu |= {
                    name: joined(parts).array if len(parts) > 1 else parts[0].array
                    for name, parts in inputs.items()
                    if name not in on_host
                }
                results = self._run_bound(on_gpu, outputs)
            to_fetch = [array for name, array in zip(outputs, results, strict=True) if name not in stay]
            if to_fetch:
                fetched = iter(self._gpu_stream.fetched(to_fetch))
            else:
                self._gpu_stream.wait()
        return [
            Resident(array, self._gpu_stream) if name in stay else next(fetched)
            for name, array in zip(outputs, results, strict=True)
        ]

    def _stage(self, slot: Slot, inputs: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[int, Tensor]]:
        """Write the inputs into the slot; return the offset of each, and its rows of all requests in the slot."""
        staged = {}
        for name, parts in inputs.items():
            first = parts[0]
            shape = first.shape if len(parts) == 1 else (sum(len(part) for part in parts), *first.shape[1:])
            nbytes = sum(part.nbytes for part in parts)
            if not nbytes:
                staged[name] = (0, np.empty(shape, first.dtype))
                continue
            start, view = slot.take(nbytes)
            rows = view.view(first.dtype).reshape(shape)
            if len(parts) == 1:
                np.copyto(rows, first)
            else:
                stack_rows(parts, rows)
            staged[name] = (start, rows)
        return staged

    def _copy_in(self, slot: Slot, staged: Mapping[str, tuple[int, Tensor]]) -> dict[str, Any]:
        """Copy all inputs of the slot to the GPU with one copy, and return the inputs there."""
        memory = self._gpu_stream.memory
        buffer = memory.empty((max(slot.filled.size, 1),), np.uint8)
        slot.send(buffer, self._gpu_stream.stream)
        return {
            name: buffer[start : start + rows.nbytes].view(rows.dtype).reshape(rows.shape)
            for name, (start, rows) in staged.items()
        }

    def _run_bound(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Enqueue the run and return its outputs on the GPU. Until a wait, only the same stream may read them."""
        memory = self._gpu_stream.memory
        device = (memory.name, memory.device_id)
        binding = self._session.io_binding()
        contiguous = {name: memory.contiguous(array) for name, array in inputs.items()}
        for name, array in contiguous.items():
            binding.bind_input(name, *device, array.dtype.type, list(array.shape), memory.pointer(array))
        for name in outputs:
            binding.bind_output(name, *device)
        try:
            with self._one_at_a_time:
                self._session.run_with_iobinding(binding, self._run_options)
        # ONNX Runtime's exceptions have no common class.
        except Exception as err:
            raise ModelFailed(plain(err)) from err
        # An output may share an input's memory, so each output keeps the inputs alive.
        return [
            memory.at(value.data_ptr(), tuple(value.shape()), self._dtype(name), (value, contiguous))
            for name, value in zip(outputs, binding.get_outputs(), strict=True)
        ]

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self._datatypes[name].dtype)


class _Staging:
    """Pinned staging slots of one session: a ring that grows with the batches."""

    def __init__(self, gpu_stream: GpuStream, slots: int) -> None:
        self._gpu_stream, self._slots = gpu_stream, slots
        self._ring: Ring | None = None
        self._lock = threading.Lock()

    def slot(self, inputs: Mapping[str, Sequence[Tensor]]) -> Slot:
        """Return a free slot with enough space for `inputs`. Blocks while all slots are in use."""
        size = sum(-(-sum(part.nbytes for part in parts) // 16) * 16 for parts in inputs.values())
        if size > _LARGEST_SLOT:
            return Ring(self._gpu_stream.memory, size, 2).slot(_SLOT_S)
        with self._lock:
            if self._ring is None or self._ring.slot_bytes < size:
                self._ring = Ring(self._gpu_stream.memory, 1 << max(size - 1, 4095).bit_length(), self._slots)
            ring = self._ring
        return ring.slot(_SLOT_S)
