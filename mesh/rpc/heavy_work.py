"""Work that holds the GIL for milliseconds, in steps: one at a time in a process, and the event loop in between.

    run(tenant, steps) ──> queue of its tenant ──turn──> turn ──> ... ──> result
                                                   └── others: their calls, then the next tenant's turn

Steps run on the event loop. In threads they would hold the GIL as long, and several would compete for it with the loop.
A turn begins when the loop has nothing else to do, or has had three times as long for others as the last turn took.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeAlias, TypeVar

from mesh.rpc.message_threads import MessageThreads, MessageWork

R = TypeVar("R")

Steps: TypeAlias = Generator[Any, None, R]
"""Work that yields after each step, and returns its result. A step should take a millisecond, and at most 10.

It yields None, or a function that runs in a thread before the next step: for work that releases the GIL, such as
NumPy's on numbers."""

# A turn ends after the step that reaches this. A call of another tenant needs several iterations of the event loop, and
# each of them may have a turn. Turns of 2 ms gave small calls a third more p99 beside texts and empty fields.
_TURN_S = 0.001

# Time that the loop has for others after a turn, in times of the turn.
_SHARE = 3

# An iteration of an idle loop takes 0.4 us, and one that reads a small request 30 us.
_IDLE_S = 0.000_02

# Returned instead of a result.
_UNFINISHED: Any = object()


class _Work:
    """Work that waits for its turns, or for a thread. When it is cancelled, it is removed."""

    __slots__ = ("done", "steps", "thread")

    def __init__(self, steps: Steps[Any], done: asyncio.Future[Any]) -> None:
        self.steps = steps
        self.done = done
        self.thread: MessageWork | None = None


class HeavyWork:
    """Turns of a process. The calls bound what waits: it is held in their memory account."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        # Tenants in the order of their next turns, with their work in the order of its arrival.
        self._waiting: dict[bytes, dict[_Work, None]] = {}
        self._threads: MessageThreads | None = None
        self._is_scheduled = False
        # Time of the last turn's steps, their end, and the time when the loop was last left to others.
        self._took_s = self._ended_at = self._left_at = 0.0
        # Function for a thread that the last turn ended with.
        self._asked: Callable[[], Any] | None = None

    async def run(self, tenant: bytes, steps: Steps[R]) -> R:
        """Return the result of `steps`; without a wait, if the loop has had its time. Raises what a step raises."""
        if not self._waiting and self._may_begin(self._clock()):
            result = self._turn(steps)
            if result is not _UNFINISHED:
                return result
        work = _Work(steps, asyncio.get_running_loop().create_future())
        self._add(tenant, work)
        try:
            found: R = await work.done
            return found
        finally:
            self._remove(tenant, work)
            # An exception refers to this frame, and the future to the exception: a reference cycle.
            del work, steps

    def close(self) -> None:
        """Start no more threads. What waits ends with its calls."""
        if self._threads is not None:
            self._threads.close()

    def _add(self, tenant: bytes, work: _Work) -> None:
        """Let the work wait for its next turn; before that, for a thread if the last turn has asked for one."""
        asked, self._asked = self._asked, None
        if asked is not None:
            if self._threads is None:
                self._threads = MessageThreads()
            work.thread = self._threads.start(tenant, asked, partial(self._back, tenant, work))
            return
        self._waiting.setdefault(tenant, {})[work] = None
        if not self._is_scheduled:
            self._schedule()

    def _back(self, tenant: bytes, work: _Work, result: Any) -> None:
        """Called when a thread has done what the work had asked for."""
        work.thread = None
        if work.done.done():
            return
        if isinstance(result, BaseException):
            work.done.set_exception(result)
        else:
            self._add(tenant, work)

    def _remove(self, tenant: bytes, work: _Work) -> None:
        if work.thread is not None:
            work.thread.cancel()
        others = self._waiting.get(tenant)
        if others is not None and others.pop(work, _UNFINISHED) is None and not others:
            del self._waiting[tenant]

    def _may_begin(self, now: float) -> bool:
        """Return True when a turn may begin or go on; False while the loop's time for others lasts."""
        if now - self._ended_at >= _SHARE * self._took_s:
            self._took_s = 0.0
        return self._took_s < _TURN_S

    def _turn(self, steps: Steps[R]) -> R:
        """Run steps until the turn has taken its time. Return the result, or _UNFINISHED."""
        began, before_s = self._clock(), self._took_s
        try:
            while True:
                self._asked = next(steps)
                if self._asked is not None or before_s + self._clock() - began >= _TURN_S:
                    unfinished: R = _UNFINISHED
                    return unfinished
        except StopIteration as end:
            result: R = end.value
            return result
        finally:
            self._ended_at = self._clock()
            self._took_s = before_s + self._ended_at - began

    def _schedule(self) -> None:
        self._is_scheduled = True
        asyncio.get_running_loop().call_soon(self._next)
        self._left_at = self._clock()

    def _next(self) -> None:
        """Give the next tenants their turn, unless others still have their time."""
        now = self._clock()
        if now - self._left_at < _IDLE_S:
            self._took_s = 0.0
        while self._waiting and self._may_begin(now):
            self._advance_next()
            now = self._ended_at
        if self._waiting:
            self._schedule()
        else:
            self._is_scheduled = False

    def _advance_next(self) -> None:
        """Run the steps of the next tenant's first work."""
        tenant = next(iter(self._waiting))
        of_tenant = self._waiting.pop(tenant)
        work = next(iter(of_tenant))
        # Otherwise it is cancelled, and removed when its task runs.
        if not work.done.done():
            try:
                result = self._turn(work.steps)
            except BaseException as err:
                work.done.set_exception(err)
            else:
                if result is not _UNFINISHED:
                    work.done.set_result(result)
        if work.done.done() or self._asked is not None:
            del of_tenant[work]
        if of_tenant:
            self._waiting[tenant] = of_tenant
        if self._asked is not None:
            self._add(tenant, work)
        # An exception refers to this frame, as to that of `run`.
        del work, of_tenant
