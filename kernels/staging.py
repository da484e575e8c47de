"""A ring of host buffers between the threads that decode and the device that reads.

    decoders ──take──> slot 0 | slot 1 | slot 2 ──send: one copy on the stream──> device
                          ^                          |
                          └── free again when the event behind its copy has passed

Decoders write straight into pinned memory: no other copy is made on the host. Two slots keep the device busy while the
next batch is decoded; a third hides a slow batch. The ring never grows: who wants a slot when all are in use waits.
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
"""Bytes. What `take` gives begins at a multiple of it: the GPU reads 16 bytes at a time."""


class Slot:
    """One buffer of a ring, from `Ring.slot` until `send` or the end of its `with` block."""

    def __init__(self, ring: Ring, number: int) -> None:
        self.number = number
        self._ring = ring
        self._buffer = ring.memory.pinned(ring.slot_bytes)
        self._event = ring.memory.event()
        self._lock = threading.Lock()
        self._used = 0
        self._held = False

    @property
    def filled(self) -> Array:
        """uint8 [bytes]: what was taken so far, as a view; its size is a multiple of ALIGNMENT."""
        return self._buffer[: self._used]

    def take(self, nbytes: int) -> tuple[int, Array]:
        """Where the next `nbytes` go, and the view to write them into. From any thread.

        The bytes between two that were taken are zeros.

        Raises:
            ValueError: they do not fit any more, or are less than one.
            RuntimeError: the slot was sent or given back.
        """
        with self._lock:
            self._check_held()
            end = self._used + nbytes
            if nbytes < 1 or end > self._buffer.size:
                free = self._buffer.size - self._used
                raise ValueError(
                    f"slot {self.number}: {nbytes} bytes do not fit into the {free} of {self._buffer.size} free"
                )
            start, self._used = self._used, -(-end // ALIGNMENT) * ALIGNMENT
            self._buffer[end : self._used] = 0
            return start, self._buffer[start:end]

    def send(self, into: Any, stream: Any) -> int:
        """Puts one copy of what was taken on `stream`, to the first bytes of `into`, and gives the slot back.

        Returns at once. The slot is written again only after the copy. Every `take` must have been written.

        Args:
            into: uint8 [bytes], where the kernels run.

        Returns:
            how many bytes.

        Raises:
            ValueError: `into` is too small; the slot is still held.
            RuntimeError: the slot was sent or given back.
        """
        with self._lock:
            self._check_held()
            filled = self.filled
            if into.ndim != 1 or into.dtype != np.uint8 or into.size < filled.size:
                told = f"{into.dtype}{list(into.shape)}"
                raise ValueError(f"slot {self.number}: {filled.size} bytes do not fit into {told}")
            self._held = False
        try:
            if filled.size:
                self._ring.memory.copy_in(filled, into[: filled.size], stream)
            self._event.record(stream)
        finally:
            self._ring.give_back(self)
        return int(filled.size)

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the slot back unsent, when it was not sent."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._ring.give_back(self)

    def begin(self) -> None:
        """For the ring: waits until the device has read what was sent, and starts anew."""
        self._event.synchronize()
        self._used, self._held = 0, True

    def _check_held(self) -> None:
        if not self._held:
            raise RuntimeError(f"slot {self.number} was sent or given back")


class Ring:
    """The slots of one model.

    Args:
        memory: where the slots are, `kernels.memory.memory()` for the place that this process uses.
        slot_bytes: of each slot, rounded up to a multiple of 16: the most that a batch needs.
        slots: 2 or more.

    Raises:
        ValueError: a size below 1, or fewer than two slots.
    """

    def __init__(self, memory: Memory, slot_bytes: int, slots: int = 3) -> None:
        if slot_bytes < 1 or slots < 2:
            raise ValueError(f"a ring needs two slots or more, of a byte or more; not {slots} of {slot_bytes} bytes")
        self.memory = memory
        self.slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self._free = deque(Slot(self, number) for number in range(slots))
        self._given_back = threading.Condition()

    def slot(self, timeout_s: float | None = None) -> Slot:
        """The slot that has been free the longest, empty. Blocks: not for an event loop.

        Waits until one is given back, then until the device has read it.

        Raises:
            TimeoutError: none was given back in time.
        """
        with self._given_back:
            if not self._given_back.wait_for(lambda: bool(self._free), timeout_s):
                raise TimeoutError(f"all slots of the ring are in use, for {timeout_s} s")
            slot = self._free.popleft()
        try:
            slot.begin()
        except BaseException:
            self.give_back(slot)
            raise
        return slot

    def give_back(self, slot: Slot) -> None:
        """For slots."""
        with self._given_back:
            self._free.append(slot)
            self._given_back.notify()
