"""Starts of calls that share a connection: their senders share the time.

    whole request ──> started at once, while the connection's turn is short and none of its sender waits
                  └──> queue of its sender ──least time among a tenant's senders, and among tenants──> started

An Envoy carries the calls of all its clients on few connections, so a call would start behind all that arrived before
it, whoever sent them. Reading a call costs a tenth of starting it: calls are read on, and wait here. Those of one
sender start in the order of their arrival. A start takes between 20 us and some milliseconds of the processor
(`Turns`), which count for its sender and its tenant: few cheap calls do not wait for many costly ones. (Start-time fair
queueing: Goyal, Vin, Cheng, 1996.)
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeAlias, TypeVar

log = logging.getLogger(__name__)

# Time for starts in one iteration of the event loop. One call may take longer.
_ITERATION_S = 0.0025

# A start counts as at most so long: some take long by chance, as with a garbage collection.
_LONGEST_S = 2 * _ITERATION_S

TASKS = 8
"""Calls that begin in tasks in one iteration. What a task costs follows later: without a bound, a small call that had
started was answered 60 ms later beside 512 such calls in flight."""

# A start of a task counts as at least its part of an iteration.
_TASK_S = _ITERATION_S / TASKS

# What a new tenant or sender has used: as much as a cheap start takes. With nothing, new ones without end would keep
# all others waiting.
_NEW_S = 0.0001

# Tenants, or senders of a tenant, that are remembered while no call of theirs waits.
_MOST_EMPTIED = 1_024

T = TypeVar("T")


class LeastUsed(Generic[T]):
    """Queues by name, none of them empty: the one that has used the least time is next."""

    __slots__ = ("_by_name", "_emptied", "_heap", "_numbers", "_used")

    def __init__(self) -> None:
        self._by_name: dict[bytes, T] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._numbers = count()
        # Time that the last queue which was taken had used. One that comes back has used as much: it saves nothing.
        self._used = 0.0
        # What queues that are empty now have used beyond that: they are soon there again, and begin with it.
        self._emptied: dict[bytes, float] = {}

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def get(self, name: bytes) -> T | None:
        """Return the queue `name`; None when there is none."""
        return self._by_name.get(name)

    def add(self, name: bytes, queue: T) -> None:
        """Add a queue."""
        self._by_name[name] = queue
        self._push(max(self._used, self._emptied.pop(name, self._used + _NEW_S)), name)

    def next(self) -> T:
        """Return the next queue. There is one."""
        self._used, _, name = self._heap[0]
        return self._by_name[name]

    def used(self, took_s: float, *, is_empty: bool) -> None:
        """Count time for the next queue, and remove it when it is empty now."""
        used, _, name = heapq.heappop(self._heap)
        used += took_s
        if is_empty:
            del self._by_name[name]
            if not self._by_name:
                self._emptied.clear()
            elif took_s:
                self._keep(name, used)
        else:
            self._push(used, name)

    def _keep(self, name: bytes, used: float) -> None:
        if len(self._emptied) >= _MOST_EMPTIED:
            self._emptied = {name: used for name, used in self._emptied.items() if used > self._used}
            if len(self._emptied) >= _MOST_EMPTIED:
                self._emptied.clear()
        self._emptied[name] = used

    def _push(self, used: float, name: bytes) -> None:
        # Of those that have used as much, the one that came first.
        heapq.heappush(self._heap, (used, next(self._numbers), name))


Start: TypeAlias = Callable[[], bool]
"""Starts a call. Returns True when it has begun in a task."""

Waiting = deque[Start]


class Starts:
    """Calls of one server that wait for their start."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self._tenants: LeastUsed[LeastUsed[Waiting]] = LeastUsed()
        self._is_scheduled = False

    def has(self, tenant: bytes, sender: bytes) -> bool:
        """Return True while a call of this sender waits."""
        senders = self._tenants.get(tenant)
        return senders is not None and senders.get(sender) is not None

    def add(self, tenant: bytes, sender: bytes, start: Start) -> None:
        """Let a call wait. `start` does nothing when the call has ended meanwhile."""
        senders = self._tenants.get(tenant)
        if senders is None:
            senders = LeastUsed()
            self._tenants.add(tenant, senders)
        waiting = senders.get(sender)
        if waiting is None:
            senders.add(sender, deque((start,)))
        else:
            waiting.append(start)
        if not self._is_scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._is_scheduled = True
        asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        """Start calls for a while."""
        tenants, began = self._tenants, self.clock()
        end, tasks = began + _ITERATION_S, 0
        while tenants and began < end and tasks < TASKS:
            senders = tenants.next()
            waiting = senders.next()
            is_task = False
            try:
                is_task = waiting.popleft()()
            # A fault of one call must not keep all others from starting.
            except Exception:
                log.exception("a fault while starting a call", {"event": "call.start_failed"})
            now = self.clock()
            tasks += is_task
            took_s = min(max(now - began, _TASK_S if is_task else 0.0), _LONGEST_S)
            senders.used(took_s, is_empty=not waiting)
            tenants.used(took_s, is_empty=not senders)
            began = now
        if tenants:
            self._schedule()
        else:
            self._is_scheduled = False
