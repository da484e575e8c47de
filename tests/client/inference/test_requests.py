"""Iterables of requests, of either kind."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from shoal.client.inference.requests import AHEAD, as_async


async def test_every_kind_of_iterable_keeps_its_order() -> None:
    async def slowly() -> AsyncIterator[int]:
        for n in range(100):
            await asyncio.sleep(0)
            yield n

    for items in (list(range(100)), (n for n in range(100)), iter(range(100)), slowly()):
        assert [item async for item in as_async(items)] == list(range(100))
    assert [item async for item in as_async(iter([]))] == []


async def test_an_item_is_yielded_while_the_next_one_is_read() -> None:
    go = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        yield 2
        assert go.wait(30)
        yield 3

    async with aclosing(as_async(source())) as items:
        assert [await anext(items), await anext(items)] == [1, 2]
        following = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        assert not following.done()
        go.set()
        assert await following == 3
        assert [item async for item in items] == []


async def test_read_ahead_is_bounded() -> None:
    asked = 0

    def source() -> Iterator[int]:
        nonlocal asked
        while True:
            asked += 1
            yield asked

    async with aclosing(as_async(source())) as items:
        for n in range(1, 200):
            assert await anext(items) == n
            assert asked <= n + AHEAD


async def test_an_error_of_the_iterable_is_raised_after_its_items() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise RuntimeError("out of files")

    async with aclosing(as_async(source())) as items:
        assert [await anext(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="out of files"):
            await anext(items)


async def test_stopping_early_reports_no_unretrieved_error() -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    left = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        assert left.wait(30)
        raise RuntimeError("nobody is there")

    async with aclosing(as_async(source())) as items:
        assert await anext(items) == 1
    left.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    await asyncio.sleep(0)
    assert not reported
