"""The ring's discipline: a slot is written again only after the device has read it, whoever is late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels.memory import HostMemory, Memory, memory
from kernels.resize_norm import Packed, pack, resize_norm
from kernels.staging import ALIGNMENT, Ring


class LateDevice(HostMemory):
    """A device whose copies happen when the test says: as a GPU's, they read the slot's memory only then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: list[Callable[[], None]] = []

    def event(self) -> Any:
        return LateEvent(self)

    def copy_in(self, host: np.ndarray, into: np.ndarray, stream: Any) -> None:
        self.log.append(f"copy on {stream}")
        self.pending.append(lambda: np.copyto(into, host))

    def catch_up(self) -> None:
        while self.pending:
            self.pending.pop(0)()


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self.device = device
        self.recorded = False

    def record(self, stream: Any) -> None:
        self.device.log.append(f"record on {stream}")
        self.recorded = True

    def synchronize(self) -> None:
        if self.recorded:
            self.device.log.append("wait")
            self.device.catch_up()


def test_the_end_of_a_block_does_not_release_what_another_holds() -> None:
    ring = Ring(HostMemory(), 100, slots=2)
    with ring.slot() as slot:
        slot.take(1)
        slot.send(np.zeros(16, np.uint8), None)
        # Two more callers, before the first one leaves its block. One of them gets its buffer.
        others = [ring.slot(), ring.slot()]
    with pytest.raises(TimeoutError):
        ring.slot(timeout_s=0)
    for number, other in enumerate(others, 1):
        other.take(16)[1][:] = number
    assert [other.filled.tolist() for other in others] == [[1] * 16, [2] * 16]
    with pytest.raises(RuntimeError, match="was sent or released"):
        slot.take(1)


def test_what_was_taken_arrives_in_one_copy() -> None:
    ring = Ring(HostMemory(), 100, slots=2)
    into = np.full(112, 9, np.uint8)
    with ring.slot() as slot:
        places = [slot.take(size) for size in (5, 16, 1)]
        for value, (_, view) in enumerate(places, 1):
            view[:] = value
        assert slot.send(into, None) == 48
    assert [start for start, _ in places] == [0, 16, 32]
    assert into.tolist() == [1] * 5 + [0] * 11 + [2] * 16 + [3] + [0] * 15 + [9] * 64


def test_a_slot_is_written_again_only_after_its_copy() -> None:
    device = LateDevice()
    ring = Ring(device, 16, slots=2)
    received = []
    for value in range(7):
        received.append(np.zeros(16, np.uint8))
        with ring.slot() as slot:
            slot.take(16)[1][:] = value
            slot.send(received[-1], "s")
    device.catch_up()
    assert [array[0] for array in received] == list(range(7))
    assert device.log[:6] == ["copy on s", "record on s", "copy on s", "record on s", "wait", "copy on s"]


def test_slots_come_in_turn_and_unsent_ones_come_back() -> None:
    ring = Ring(HostMemory(), 16, slots=3)
    order = []
    for send in (True, False, True, True):
        with ring.slot() as slot:
            order.append(slot.number)
            if send:
                slot.send(np.zeros(16, np.uint8), None)
    assert order == [0, 1, 2, 0]
    with pytest.raises(ZeroDivisionError), ring.slot():
        raise ZeroDivisionError
    held = [ring.slot() for _ in range(3)]
    assert {slot.number for slot in held} == {0, 1, 2}


def test_who_finds_all_slots_in_use_waits() -> None:
    ring = Ring(HostMemory(), 16, slots=2)
    held = [ring.slot(), ring.slot()]
    with pytest.raises(TimeoutError, match="all slots of the ring are in use"):
        ring.slot(timeout_s=0)
    got = []
    waiter = threading.Thread(target=lambda: got.append(ring.slot(timeout_s=30)))
    waiter.start()
    held[1].send(np.zeros(16, np.uint8), None)
    waiter.join()
    assert got[0].number == held[1].number


def test_many_decoders_fill_one_slot() -> None:
    ring = Ring(HostMemory(), 64 * ALIGNMENT, slots=2)
    with ring.slot() as slot:
        starts: list[int] = []

        def decode() -> None:
            for _ in range(8):
                start, view = slot.take(3)
                view[:] = start // ALIGNMENT
                starts.append(start)

        threads = [threading.Thread(target=decode) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(starts) == [ALIGNMENT * n for n in range(64)]
        assert all(slot.filled[start] == start // ALIGNMENT for start in starts)


def test_misuse_is_told() -> None:
    ring = Ring(HostMemory(), 30, slots=2)
    slot = ring.slot()
    with pytest.raises(ValueError, match="33 bytes do not fit into the 32 of 32 free"):
        slot.take(33)
    with pytest.raises(ValueError, match="0 bytes"):
        slot.take(0)
    slot.take(20)
    with pytest.raises(ValueError, match=r"32 bytes do not fit into uint8\[16\]"):
        slot.send(np.zeros(16, np.uint8), None)
    slot.send(np.zeros(32, np.uint8), None)
    for call in (lambda: slot.take(1), lambda: slot.send(np.zeros(32, np.uint8), None)):
        with pytest.raises(RuntimeError, match="was sent or released"):
            call()
    for sizes in ((0, 2), (16, 1)):
        with pytest.raises(ValueError, match="two slots or more"):
            Ring(HostMemory(), *sizes)


@pytest.mark.parametrize("where", [HostMemory, pytest.param(memory, marks=pytest.mark.gpu)])
def test_a_batch_of_images_through_the_ring(where: Callable[[], Memory]) -> None:
    rng = np.random.default_rng(0)
    place = where()
    stream = place.stream()
    ring = Ring(place, 4096, slots=2)
    device_pixels, device_table = place.empty((4096,), np.uint8), place.empty((3, 32), np.uint8)
    out, result = place.empty((3, 3, 8, 8), np.float32), place.pinned(3 * 3 * 8 * 8 * 4).view(np.float32)
    for _ in range(5):
        images = [
            rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((9, 7), (16, 16), (3, 30))
        ]
        with ring.slot() as slot:
            for image in images:
                slot.take(image.size)[1][:] = image.ravel()
            table = pack(images, (8, 8)).table
            used = slot.send(device_pixels, stream)
        place.copy_in(Packed(None, table).table_bytes(), device_table, stream)
        on_device = table if place.name == "cpu" else device_table
        resize_norm(Packed(device_pixels[:used], on_device), out, stream=stream)
        place.copy_out(out, result.reshape(out.shape), stream)
        mark = place.event()
        mark.record(stream)
        mark.synchronize()
        # The same numbers on the CPU; a GPU's weights are float32.
        assert np.abs(result.reshape(out.shape) - resize_norm(images, size=(8, 8))).max() <= 1e-4
