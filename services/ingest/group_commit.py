"""Group commit: many callers, one write.

    add ─┐
    add ─┼─> waiting ──(write in flight? then gather; else go at once)──> write(group) ──> each caller its own answer
    add ─┘

A lone caller never waits for company. While a write is under way the next group gathers, so the group grows with the
load and the cost of a durable write is shared: 100 documents a write are 11 times as fast as one each.

With two writes at a time, a second one begins when as many wait as are in the first: callers that wait for their answer
before they come again are then in two halves, and while one half is written the other makes its way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from types import TracebackType
from typing import Generic, TypeVar

from mesh.process.tasks import end
from shoal.errors import Internal, ShoalError, Unavailable

log = logging.getLogger(__name__)

_LAST_WRITE_S = 2.0
# What is under way at the end may take so long: what it writes to may be away.

T = TypeVar("T")
R = TypeVar("R")


def _nobody(_: object) -> None:
    """Nobody wants to hear of what has left."""


class Group(Generic[T, R]):
    """Writes items in groups. Used as `async with`; leaving waits a little for what is under way.

    `write` gets 1 to `max_items` items of at most `max_bytes` together (a larger one goes alone) and returns an answer
    or an error for each, in their order. What it raises is everyone's error. The queue has no bound of its own: callers
    wait for their answer, so whoever bounds the callers bounds the queue.

    Args:
        limit_s: who waited so long for an answer gets Unavailable; what is written then may or may not be there.
        on_left: hears of items that are held no more: written, refused, or given up.
        writes: how many are under way at a time.
        follows: whether an item is only written when all that came before it was.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[list[T]], Awaitable[Sequence[R | ShoalError]]],
        *,
        max_items: int,
        max_bytes: int,
        size: Callable[[T], int] = lambda _: 0,
        limit_s: float | None = None,
        on_left: Callable[[Sequence[T]], None] = _nobody,
        writes: int = 1,
        follows: Callable[[T], bool] = lambda _: False,
    ) -> None:
        self._name = name
        self._write = write
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._size = size
        self._limit_s = limit_s
        self._on_left = on_left
        self._writes = writes
        self._follows = follows
        self._waiting: deque[tuple[T, asyncio.Future[R], float]] = deque()
        self._followers = 0
        self._under_way: dict[asyncio.Task[None], list[tuple[T, asyncio.Future[R], float]]] = {}
        self._arrived = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Group[T, R]:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name=f"group {self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._closed = True
        self._arrived.set()
        assert self._task is not None
        await asyncio.wait([self._task], timeout=_LAST_WRITE_S)
        await end(self._task, *self._under_way)
        if self._timer is not None:
            self._timer.cancel()
        left = [*self._waiting]
        self._waiting.clear()
        self._followers = 0
        _fail(left, Unavailable(f"{self._name}: this instance has stopped"))
        self._on_left([item for item, _, _ in left])

    def add(self, item: T) -> asyncio.Future[R]:
        """Hands `item` to the next group. The future gets its answer or its error; cancelled, it is not written.

        Raises:
            Unavailable: the group is closed.
        """
        if self._closed:
            raise Unavailable("this instance is stopping: another one takes it")
        future: asyncio.Future[R] = self._loop.create_future()
        if self._limit_s is not None and self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._expire)
        self._waiting.append((item, future, self._loop.time()))
        self._followers += self._follows(item)
        self._arrived.set()
        return future

    async def put(self, item: T) -> R:
        """Hands `item` to the next group and returns its answer, or raises its error.

        Raises:
            Unavailable: the group is closed.
        """
        return await self.add(item)

    async def put_all(self, items: Sequence[T]) -> list[R | ShoalError]:
        """Hands all `items` to the next groups and returns the answer or the error of each, in their order."""
        try:
            futures = [self.add(item) for item in items]
        except ShoalError as err:
            return [err] * len(items)
        if not futures:
            return []
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()
            raise
        return list(map(_outcome, futures))

    def _expire(self) -> None:
        """One timer for all: it looks at the oldest, which come first."""
        assert self._limit_s is not None
        self._timer = None
        before = self._loop.time() - self._limit_s
        late = Unavailable(f"{self._name}: nothing was written for {self._limit_s:.0f} s: retry in a moment")
        for entry in chain(*self._under_way.values(), self._waiting):
            if entry[2] > before:
                self._timer = self._loop.call_at(entry[2] + self._limit_s, self._expire)
                return
            _fail([entry], late)

    async def _run(self) -> None:
        while self._waiting or self._under_way or not self._closed:
            if not self._may_write():
                self._arrived.clear()
                await self._arrived.wait()
            elif group := self._gather():
                task = asyncio.create_task(self._commit(group), name=f"write of {self._name}")
                self._under_way[task] = group
                task.add_done_callback(self._written)

    def _may_write(self) -> bool:
        if not self._waiting or len(self._under_way) >= self._writes:
            return False
        most = max(map(len, self._under_way.values()), default=0)
        return not most or (len(self._waiting) >= most and not self._followers)

    def _written(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self._arrived.set()

    def _gather(self) -> list[tuple[T, asyncio.Future[R], float]]:
        group: list[tuple[T, asyncio.Future[R], float]] = []
        unwanted: list[T] = []
        nbytes = 0
        while self._waiting and len(group) < self._max_items:
            entry = self._waiting[0]
            nbytes += self._size(entry[0])
            if group and nbytes > self._max_bytes:
                break
            self._waiting.popleft()
            self._followers -= self._follows(entry[0])
            if entry[1].done():  # Its caller has given up: then nobody wants it written.
                unwanted.append(entry[0])
            else:
                group.append(entry)
        if unwanted:
            self._on_left(unwanted)
        return group

    async def _commit(self, group: list[tuple[T, asyncio.Future[R], float]]) -> None:
        items = [item for item, _, _ in group]
        try:
            answers = await self._write(items)
            for (_, future, _), answer in zip(group, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, ShoalError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        except ShoalError as err:
            _fail(group, err)
        except Exception:
            log.exception("writing a group of %s", self._name)
            _fail(group, Internal(f"{self._name}: an unexpected error; the log has the cause"))
        finally:
            # Cancelled in the middle: nobody may be left waiting for ever.
            _fail(group, Unavailable(f"{self._name}: interrupted"))
            self._on_left(items)


def _outcome(future: asyncio.Future[R]) -> R | ShoalError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, ShoalError):
        return error
    raise error


def _fail(group: Sequence[tuple[object, asyncio.Future[R], float]], error: ShoalError) -> None:
    for _, future, _ in group:
        if not future.done():
            future.set_exception(type(error)(error.message, retry_after_ms=error.retry_after_ms))
