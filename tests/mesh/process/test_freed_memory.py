"""Freed memory goes back to the system once requests are over."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Iterator

import pytest

from mesh.process import freed_memory, main
from mesh.process.freed_memory import FreedMemory

PATIENCE_S = 30.0
PIECES, PIECE_BYTES = 1024, 64 << 10

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only")


async def test_memory_is_returned_when_requests_hold_little(monkeypatch):
    monkeypatch.setattr(freed_memory, "_CHECK_S", 0.01)
    is_quiet = False
    watch = FreedMemory(lambda: is_quiet)
    # Otherwise, memory that earlier tests have freed would be used again.
    freed_memory.return_freed_memory()
    watch.start()
    before = freed_memory._resident_bytes()
    pieces = [b"x" * PIECE_BYTES for _ in range(PIECES)]
    # The newest piece stays: glibc itself returns only what is above the last one in use.
    last = pieces[-1]
    pieces.clear()
    await asyncio.sleep(0.05)
    kept = freed_memory._resident_bytes()
    assert kept - before > PIECES * PIECE_BYTES / 2
    is_quiet = True
    async with asyncio.timeout(PATIENCE_S):
        while freed_memory._resident_bytes() > before + PIECES * PIECE_BYTES / 8:
            await asyncio.sleep(0.01)
    watch.stop()
    assert len(last) == PIECE_BYTES


class Process:
    """Memory and objects of a process, as FreedMemory sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resident = self.in_use = 100 << 20
        self.is_quiet = True
        self.trims = self.collections = self.old = 0
        self.now = 0.0
        monkeypatch.setattr(freed_memory, "_resident_bytes", lambda: self.resident)
        monkeypatch.setattr(freed_memory, "return_freed_memory", self._trim)
        monkeypatch.setattr(freed_memory, "gc", self)
        monkeypatch.setattr(freed_memory, "time", self)
        self.shrinks = 0
        self.watch = FreedMemory(lambda: self.is_quiet, self._shrink)

    def _shrink(self) -> None:
        self.shrinks += 1

    def _trim(self) -> None:
        assert self.shrinks > self.trims
        self.trims += 1
        self.resident = self.in_use

    def get_count(self) -> tuple[int, int, int]:
        return 0, 0, self.old

    def collect(self) -> None:
        self.collections += 1
        self.old = 0
        self.now += 0.2

    def perf_counter(self) -> float:
        return self.now

    def check(self, times: int) -> None:
        for _ in range(times):
            self.now += 1.0
            self.watch._check()
            self.watch._timer.cancel()
            # The trim has its own thread.
            self.watch._pool.submit(bool).result()


@pytest.fixture
async def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    made = Process(monkeypatch)
    made.watch.start()
    made.check(2)
    yield made
    made.watch.stop()


async def test_memory_that_is_freed_after_a_trim_is_returned_by_a_later_one(process: Process):
    process.resident = process.in_use = 500 << 20
    process.check(20)
    few = process.trims
    assert 2 <= few <= 6
    process.in_use = 100 << 20
    process.check(16)
    assert process.resident == 100 << 20
    process.check(100)
    assert process.trims == few + 1


async def test_nothing_is_trimmed_or_collected_while_requests_hold_much(process: Process):
    process.is_quiet, process.resident, process.old = False, 500 << 20, 100
    process.check(5)
    assert not process.trims
    assert not process.collections
    process.is_quiet = True
    # What a call holds is released before its objects are gone.
    process.check(1)
    assert not process.collections
    process.check(1)
    assert process.collections == 1
    assert process.trims == 1


async def test_a_flood_after_a_quiet_hour_is_not_stopped_by_a_collection_at_once(process: Process):
    process.check(3600)
    process.is_quiet, process.old = False, 100
    process.check(10)
    assert not process.collections
    process.check(2)
    assert process.collections == 1


async def test_collections_of_a_process_that_is_never_quiet_take_a_hundredth_of_its_time(process: Process):
    process.is_quiet = False
    for _ in range(1000):
        process.old += 100
        process.check(1)
    assert 40 <= process.collections <= 50


def test_full_collections_are_left_to_the_watch():
    assert main._COLLECTED_AT[2] > 100_000
    assert gc.get_threshold()[2] < 100_000, "only main sets it"
