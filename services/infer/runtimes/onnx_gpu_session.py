"""ONNX Runtime on the lane of its GPU: one copy in, the model, the copies out, all on one stream; one wait at the end.

    rows of each call ──written once──> pinned slot ──one copy──> GPU ──> model ──> outputs ──> pinned ──> host
    residents ─────────────────────────────joined there──────────────────┘   └── those that stay there: residents

The session gets the lane's stream (`user_compute_stream`) and pointers (IOBinding). It ends with a wait in any case:
what an execution takes is then what it took, which is what queues and deadlines count on.
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

_LARGEST_SLOT = 64 << 20
# Beyond, a slot is made for one execution and given back: a ring keeps its memory pinned for ever.
_SLOT_S = 60.0
_WITHOUT_WAITING = "disable_synchronize_execution_providers"


class LaneSession(OnnxSession):
    """One model on one GPU."""

    def __init__(self, session: Any, run_entries: Mapping[str, str], lane: GpuStream, runs: int) -> None:
        """`runs`: executions at a time. Raises FailedPrecondition when a tensor is none of numbers."""
        super().__init__(session, {**run_entries, _WITHOUT_WAITING: "1"}, lane.gpu)
        self.lane = self._lane = lane
        if odd := [spec.name for spec in self.specs if spec.datatype.is_bytes or spec.datatype.name == "BF16"]:
            raise FailedPrecondition(f"parameter gpu_stream 'shared': tensor '{odd[0]}' is none of numbers: use 'own'")
        self._staging = _Staging(lane, runs + 1)
        self._one_at_a_time = threading.Lock()
        # A session with a stream of ours is not run by two threads at the same time.

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        return self.run_parts({name: [array] for name, array in inputs.items()}, outputs)

    def run_parts(
        self, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str], stay: Collection[str] = ()
    ) -> list[Any]:
        on_host = {name: parts for name, parts in inputs.items() if not isinstance(parts[0], Resident)}
        with self._staging.slot(on_host) as slot:
            bound = self._written(slot, on_host)
            with self._lane.using():
                there = self._sent(slot, bound)
                there |= {
                    name: joined(parts).array if len(parts) > 1 else parts[0].array
                    for name, parts in inputs.items()
                    if name not in on_host
                }
                found = self._ran(there, outputs)
            left = [array for name, array in zip(outputs, found, strict=True) if name not in stay]
            if left:
                fetched = iter(self._lane.fetched(left))
            else:
                self._lane.wait()
        return [
            Resident(array, self._lane) if name in stay else next(fetched)
            for name, array in zip(outputs, found, strict=True)
        ]

    def _written(self, slot: Slot, inputs: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[int, Tensor]]:
        """Where each input begins in the slot, and the rows of all calls as they lie there."""
        places = {}
        for name, parts in inputs.items():
            first = parts[0]
            shape = first.shape if len(parts) == 1 else (sum(len(part) for part in parts), *first.shape[1:])
            nbytes = sum(part.nbytes for part in parts)
            if not nbytes:
                places[name] = (0, np.empty(shape, first.dtype))
                continue
            start, view = slot.take(nbytes)
            rows = view.view(first.dtype).reshape(shape)
            if len(parts) == 1:
                np.copyto(rows, first)
            else:
                stack_rows(parts, rows)
            places[name] = (start, rows)
        return places

    def _sent(self, slot: Slot, written: Mapping[str, tuple[int, Tensor]]) -> dict[str, Any]:
        """The inputs on the GPU: one copy takes all of them."""
        memory = self._lane.memory
        buffer = memory.empty((max(slot.filled.size, 1),), np.uint8)
        slot.send(buffer, self._lane.stream)
        return {
            name: buffer[start : start + rows.nbytes].view(rows.dtype).reshape(rows.shape)
            for name, (start, rows) in written.items()
        }

    def _ran(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """The outputs on the GPU, on their way: only what is on the same stream may read them before it was waited."""
        memory = self._lane.memory
        where = (memory.name, memory.device_id)
        binding = self._session.io_binding()
        held = {name: memory.contiguous(array) for name, array in inputs.items()}
        for name, array in held.items():
            binding.bind_input(name, *where, array.dtype.type, list(array.shape), memory.pointer(array))
        for name in outputs:
            binding.bind_output(name, *where)
        try:
            with self._one_at_a_time:
                self._session.run_with_iobinding(binding, self._run_options)
        except Exception as err:  # It has no common class.
            raise ModelFailed(plain(err)) from err
        # An output may be an input's memory: that lives for as long as the output.
        return [
            memory.at(value.data_ptr(), tuple(value.shape()), self._dtype(name), (value, held))
            for name, value in zip(outputs, binding.get_outputs(), strict=True)
        ]

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self._datatypes[name].dtype)


class _Staging:
    """The pinned slots of one session: a ring that grows to what batches need."""

    def __init__(self, lane: GpuStream, slots: int) -> None:
        self._lane, self._slots = lane, slots
        self._ring: Ring | None = None
        self._lock = threading.Lock()

    def slot(self, inputs: Mapping[str, Sequence[Tensor]]) -> Slot:
        """One that these fit into. Blocks while all are in use."""
        need = sum(-(-sum(part.nbytes for part in parts) // 16) * 16 for parts in inputs.values())
        if need > _LARGEST_SLOT:
            return Ring(self._lane.memory, need, 2).slot(_SLOT_S)
        with self._lock:
            if self._ring is None or self._ring.slot_bytes < need:
                self._ring = Ring(self._lane.memory, 1 << max(need - 1, 4095).bit_length(), self._slots)
            ring = self._ring
        return ring.slot(_SLOT_S)
