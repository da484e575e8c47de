"""Runs tasks side by side, one operation of MongoDB or of a blob store at a time, in an order that a test chooses."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from pymongo.asynchronous.pool import AsyncConnection

from services.store.artifacts.local_blobs import LocalBlobs

_SETTLED_S = 0.01
# An operation that MongoDB makes wait for another one's transaction does not come back before that goes on.


class Turnstile:
    """Stops each of its tasks before every operation until it is let through."""

    def __init__(self, order: Sequence[tuple[int, int]]) -> None:
        """`order`: which task goes on, and for how many operations; over and over."""
        self._order = itertools.cycle([task for task, steps in order for _ in range(steps)])
        self._waiting: dict[asyncio.Task[Any], asyncio.Event] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self._moved = asyncio.Event()
        self.passed: Counter[int] = Counter()
        """Operations so far, by the number of the task."""

    async def pass_through(self) -> None:
        """Called before each operation, by whichever task."""
        task = asyncio.current_task()
        if task is None or task not in self._tasks:
            return  # A monitor of the driver, or the test itself.
        self._waiting[task] = asyncio.Event()
        self._moved.set()
        await self._waiting[task].wait()

    async def run(self, *work: Coroutine[Any, Any, Any]) -> None:
        """Runs all of it; raises what any of it raised."""
        self._tasks = [asyncio.create_task(each) for each in work]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._moved.set())
        while not all(task.done() for task in self._tasks):
            await self._settle()
            if self._waiting:
                chosen = self._chosen(next(self._order))
                self._waiting.pop(chosen).set()
                self.passed[self._tasks.index(chosen)] += 1
        await asyncio.gather(*self._tasks)

    def _chosen(self, number: int) -> asyncio.Task[Any]:
        """The task of that number, or the next one that can go on."""
        start = number % len(self._tasks)
        return next(task for task in self._tasks[start:] + self._tasks[:start] if task in self._waiting)

    async def _settle(self) -> None:
        """Waits until every task has stopped or ended, or seems to wait for another one in MongoDB."""
        while any(not task.done() and task not in self._waiting for task in self._tasks):
            self._moved.clear()
            try:
                await asyncio.wait_for(self._moved.wait(), _SETTLED_S)
            except TimeoutError:
                if self._waiting:
                    return


@contextmanager
def stopped_at(turnstiles: list[Turnstile]) -> Iterator[None]:
    """Has every operation pass the turnstile that is the last of `turnstiles` then."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("command", "send_message"):
            patch.setattr(AsyncConnection, name, _stopping(getattr(AsyncConnection, name), turnstiles))
        for name in ("size", "put", "adopt", "remove"):
            patch.setattr(LocalBlobs, name, _stopping(getattr(LocalBlobs, name), turnstiles))
        yield


def _stopping(method: Any, turnstiles: list[Turnstile]) -> Any:
    async def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if turnstiles:
            await turnstiles[-1].pass_through()
        return await method(self, *args, **kwargs)

    return stopping
