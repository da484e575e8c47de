"""Group commit: alone at once, together under load, each its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from services.ingest.group_commit import Group
from shoal.errors import Internal, InvalidArgument, ShoalError, Unavailable


class Writer:
    """Writes when it is let."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.may = asyncio.Semaphore(0)

    async def __call__(self, items: list[int]) -> Sequence[int | ShoalError]:
        self.groups.append(items)
        await self.may.acquire()
        if -1 in items:
            raise Unavailable("away")
        if -2 in items:
            raise RuntimeError("a fault")
        return [InvalidArgument(f"{item}") if item % 10 == 9 else item * 2 for item in items]


def group(writer: Writer, max_items: int = 5, max_bytes: int = 100) -> Group[int, int]:
    return Group("numbers", writer, max_items=max_items, max_bytes=max_bytes, size=abs)


async def puts(into: Group[int, int], *items: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(into.put(item)) for item in items]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_the_next_group_gathers_while_one_is_written() -> None:
    writer = Writer()
    async with group(writer) as numbers:
        first = await puts(numbers, 1)
        assert writer.groups == [[1]]
        rest = await puts(numbers, 2, 3, 4, 5, 6, 7, 8)
        for _ in range(3):
            writer.may.release()
        assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10, 12, 14, 16]
        assert writer.groups == [[1], [2, 3, 4, 5, 6], [7, 8]]


async def test_bytes_bound_a_group_and_a_large_item_goes_alone() -> None:
    writer = Writer()
    async with group(writer) as numbers:
        tasks = await puts(numbers, 1, 60, 50, 1_000, 2)
        for _ in range(5):
            writer.may.release()
        await asyncio.gather(*tasks)
        assert writer.groups == [[1, 60], [50], [1_000], [2]]


async def test_each_gets_its_own_answer_and_errors_are_not_shared_objects() -> None:
    writer = Writer()
    async with group(writer) as numbers:
        writer.may.release()
        tasks = await puts(numbers, 1, 9, 3)
        writer.may.release()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers[0] == 2
        assert isinstance(answers[1], InvalidArgument)
        for item, error in ((-1, Unavailable), (-2, Internal)):
            tasks = await puts(numbers, item, 1)
            writer.may.release()
            writer.may.release()
            first = (await asyncio.gather(*tasks, return_exceptions=True))[0]
            assert isinstance(first, error)


async def test_nobody_wants_what_was_given_up() -> None:
    writer = Writer()
    async with group(writer) as numbers:
        first = await puts(numbers, 1)
        given_up = await puts(numbers, 2, 3)
        given_up[0].cancel()
        writer.may.release()
        writer.may.release()
        assert await asyncio.gather(*first, given_up[1]) == [2, 6]
        assert writer.groups == [[1], [3]]


async def test_after_the_end_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.ingest.group_commit._LAST_WRITE_S", 0.01)
    writer = Writer()
    numbers = group(writer)
    async with numbers:
        tasks = await puts(numbers, 1, 2)
        tasks += await puts(numbers, 3)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    with pytest.raises(Unavailable):
        await numbers.put(4)


async def test_who_waits_too_long_is_told_and_what_leaves_is_counted_once() -> None:
    writer, left = Writer(), list[int]()
    numbers: Group[int, int] = Group(
        "numbers", writer, max_items=2, max_bytes=100, size=abs, limit_s=0.5, on_removed=left.extend
    )
    async with numbers:
        tasks = await puts(numbers, 1, 2, 3, 4)
        tasks[3].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers[:3]] == [Unavailable] * 3
        assert left == []  # The first write still has two of them.
        late = await puts(numbers, 5)
        for _ in range(3):
            writer.may.release()
        assert await late[0] == 10
        assert sorted(left) == [1, 2, 3, 4, 5]
        assert writer.groups == [[1, 2], [5]]


async def test_senders_take_turns_and_each_one_s_items_keep_their_order() -> None:
    writer = Writer()
    numbers: Group[int, int] = Group(
        "numbers", writer, max_items=4, max_bytes=10_000, size=abs, sender=lambda item: item // 100
    )
    async with numbers:
        tasks = await puts(numbers, 100)
        tasks += await puts(numbers, *range(101, 107), 200, 300, 301)
        tasks[2].cancel()
        for _ in range(4):
            writer.may.release()
        await asyncio.wait(tasks)
        assert writer.groups == [[100], [101, 200, 300, 103], [301, 104, 105, 106]]


async def test_an_item_that_costs_more_leaves_room_for_fewer() -> None:
    writer = Writer()
    numbers: Group[int, int] = Group("numbers", writer, max_items=5, max_bytes=10_000, size=abs, cost=lambda item: item)
    async with numbers:
        tasks = await puts(numbers, 1)
        tasks += await puts(numbers, 2, 3, 1, 8, 1)
        for _ in range(5):
            writer.may.release()
        await asyncio.gather(*tasks)
        assert writer.groups == [[1], [2, 3], [1], [8], [1]]


async def test_no_sender_s_items_wait_longer_than_the_limit() -> None:
    writer, left = Writer(), list[int]()
    numbers: Group[int, int] = Group(
        "numbers",
        writer,
        max_items=2,
        max_bytes=10_000,
        size=abs,
        limit_s=0.5,
        on_removed=left.extend,
        sender=lambda item: item // 100,
    )
    async with numbers:
        tasks = await puts(numbers, 100)
        tasks += await puts(numbers, 101, 200)
        await asyncio.sleep(0.3)
        # The second sender's item is younger than the first one's, and both come after the one in flight.
        tasks += await puts(numbers, 300, 102)
        await asyncio.wait(tasks[:3], timeout=30)
        assert [task.done() for task in tasks] == [True, True, True, False, False]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Unavailable] * 5
        writer.may.release()
        late = await puts(numbers, 103)
        writer.may.release()
        assert await late[0] == 206
        assert sorted(left) == [100, 101, 102, 103, 200, 300]
        assert writer.groups == [[100], [103]]
