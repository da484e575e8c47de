"""Ring of pinned host buffers between decoder threads and the device.

    decoders ──take──> slot 0 | slot 1 | slot 2 ──send: one copy on the stream──> device
                          ^                          |
                          └── free again when the event after its copy has passed

Decoders write directly into pinned memory, without another copy on the host. Two slots keep the device busy while the
next batch is decoded; a third hides a slow batch. The ring never grows: a caller waits while all slots are in use.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.memory import Memory

Array = npt.NDArray[Any]
ALIGNMENT = 16
"""Alignment in bytes of each view from `take`: the GPU reads 16 bytes at a time."""


class _Buffer:
    """Memory of one slot at a time."""

    def __init__(self, memory: Memory, number: int, nbytes: int) -> None:
        self.number = number
        self.array = memory.pinned(nbytes)
        self.event = memory.event()
        """Passes when the device has read the last copy."""


class Slot:
    """Hold on one buffer of a ring, from `Ring.slot` until `send` or the end of its `with` block.

    Each hold is an object of its own: a block that ends after `send` must not release the next hold on its buffer.
    """

    def __init__(self, ring: Ring, buffer: _Buffer) -> None:
        self.number = buffer.number
        self._ring = ring
        self._buffer = buffer
        self._lock = threading.Lock()
        self._used = 0
        self._held = True

    @property
    def filled(self) -> Array:
        """View of all bytes taken so far, uint8; its size is a multiple of ALIGNMENT."""
        return self._buffer.array[: self._used]

    def take(self, nbytes: int) -> tuple[int, Array]:
        """Reserve the next `nbytes` of the slot; return their offset, and a view to write to. Thread-safe.

        Padding between two reservations is zero.

        Raises:
            ValueError: `nbytes` is below 1, or larger than the free space.
            RuntimeError: the slot was sent or released.
        """
        with self._lock:
            self._check_held()
            array, end = self._buffer.array, self._used + nbytes
            if nbytes < 1 or end > array.size:
                free = array.size - self._used
                raise ValueError(f"slot {self.number}: {nbytes} bytes do not fit into the {free} of {array.size} free")
            start, self._used = self._used, -(-end // ALIGNMENT) * ALIGNMENT
            array[end : self._used] = 0
            return start, array[start:end]

    def send(self, into: Any, stream: Any) -> int:
        """Enqueue one copy of the taken bytes on `stream`, to the start of `into`, and release the slot.

        Does not wait; the slot is reused only after the copy. All views from `take` must be written before the call.

        Args:
            into: uint8 [bytes] on the device.

        Returns:
            The number of bytes.

        Raises:
            ValueError: `into` is too small; the slot is still held.
            RuntimeError: the slot was sent or released.
        """
        with self._lock:
            self._check_held()
            filled = self.filled
            if into.ndim != 1 or into.dtype != np.uint8 or into.size < filled.size:
                found = f"{into.dtype}{list(into.shape)}"
                raise ValueError(f"slot {self.number}: {filled.size} bytes do not fit into {found}")
            self._held = False
        try:
            if filled.size:
                self._ring.memory.copy_in(filled, into[: filled.size], stream)
            self._buffer.event.record(stream)
        finally:
            self._ring.release(self._buffer)
        return int(filled.size)

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the slot, unless `send` has released it."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._ring.release(self._buffer)

    def _check_held(self) -> None:
        if not self._held:
            raise RuntimeError(f"slot {self.number} was sent or released: take a new slot from the ring")


class Ring:
    """Fixed set of slots, for one model.

    Args:
        memory: memory of the slots; `kernels.memory.memory()` returns that of this process's device.
        slot_bytes: size of each slot, rounded up to a multiple of 16; the largest batch must fit.
        slots: 2 or more.

    Raises:
        ValueError: a size below 1, or fewer than two slots.
    """

    def __init__(self, memory: Memory, slot_bytes: int, slots: int = 3) -> None:
        if slot_bytes < 1 or slots < 2:
            raise ValueError(f"a ring needs two slots or more, of a byte or more; not {slots} of {slot_bytes} bytes")
        self.memory = memory
        self.slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self._free = deque(_Buffer(memory, number, self.slot_bytes) for number in range(slots))
        self._released = threading.Condition()

    def slot(self, timeout_s: float | None = None) -> Slot:
        """Return the slot that has been free for the longest time, empty. Blocks; do not call it on an event loop.

        Waits until a slot is released, then until the device has read it.

        Raises:
            TimeoutError: no slot was released in time.
        """
        with self._released:
            if not self._released.wait_for(lambda: bool(self._free), timeout_s):
                raise TimeoutError(f"all slots of the ring are in use, for {timeout_s} s")
            buffer = self._free.popleft()
        try:
            buffer.event.synchronize()
        except BaseException:
            self.release(buffer)
            raise
        return Slot(self, buffer)

    def release(self, buffer: _Buffer) -> None:
        """Make a buffer available again. Called by slots."""
        with self._released:
            self._free.append(buffer)
            self._released.notify()
