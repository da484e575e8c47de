"""Large responses that a store reads at a time are bounded, and tenants take turns."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from services.store.results.read_gate import ReadGate

MIB = 1 << 20


class Readers:
    """Reads of a gate for 10 MiB, each until it is ended."""

    def __init__(self) -> None:
        self.gate = ReadGate(10 * MIB)
        self.order: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, mib: int, tenant: str = "t") -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._read(name, mib * MIB, tenant))
        await turns()

    async def _read(self, name: str, size: int, tenant: str) -> None:
        with self.gate.reading(tenant) as reading:
            await reading.take(size)
            self.order.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await turns()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_reads_wait_for_room_and_small_ones_do_not():
    readers = Readers()
    for name in "abc":
        await readers.start(name, 4)
    assert readers.order == ["a", "b"]
    await readers.start("small", 1)
    assert readers.order == ["a", "b", "small"]
    await readers.end("a")
    assert readers.order[-1] == "c"
    for name in ("b", "c", "small"):
        await readers.end(name)
    assert readers.gate.held == 0


async def test_a_read_that_is_larger_than_the_gate_runs_alone():
    readers = Readers()
    await readers.start("a", 4)
    await readers.start("huge", 100)
    await readers.start("b", 4)
    assert readers.order == ["a"]
    await readers.end("a")
    assert readers.order == ["a", "huge"]
    await readers.end("huge")
    assert readers.order == ["a", "huge", "b"]


async def test_tenants_take_turns():
    readers = Readers()
    for n in range(4):
        await readers.start(f"many{n}", 10, "many")
    await readers.start("one", 10, "one")
    for name in ("many0", "many1", "one", "many2", "many3"):
        assert readers.order[-1] == name
        await readers.end(name)


@pytest.mark.parametrize("cancelled", ["first", "huge", "last"])
async def test_a_cancelled_read_leaves_no_place_taken(cancelled: str):
    readers = Readers()
    await readers.start("first", 8)
    await readers.start("huge", 100)
    await readers.start("last", 2)
    await readers.cancel(cancelled)
    left = [name for name in ("first", "huge", "last") if name != cancelled]
    for name in left:
        assert name in readers.order
        await readers.end(name)
    assert readers.gate.held == 0


async def test_a_place_that_is_given_to_a_cancelled_read_goes_to_the_next():
    readers = Readers()
    with readers.gate.reading(None) as reading:
        await reading.take(10 * MIB)
        await readers.start("a", 10)
        await readers.start("b", 10)
    # "a" has its place, and is cancelled before it runs.
    await readers.cancel("a")
    assert readers.order == ["b"]
    await readers.end("b")
    assert readers.gate.held == 0


async def test_a_read_takes_one_place():
    gate = ReadGate(10 * MIB)
    with ExitStack() as stack:
        reading = stack.enter_context(gate.reading(None))
        await reading.take(6 * MIB)
        await reading.take(8 * MIB)
        assert gate.held == 6 * MIB
    assert gate.held == 0
