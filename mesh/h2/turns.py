"""Turns of a server's connections: what they send is handled in bounded pieces, one connection after the other.

    data ──first frames──> handled at once: many of the first connection, few of each other in the same iteration
         └──more──> the connections of a kind, by the time their turns took
                      └──in each iteration, turns of each kind's that used least, as many as the kind may ──> handled

With turns in their order of arrival, a connection that sends a few hundred frames a second fell behind those that
flood. (Start-time fair queueing: Goyal, Vin, Cheng, 1996. What a turn counts is bounded here, and a new connection has
used a little: none is kept waiting without end.) A connection has one turn in an iteration.

Kinds (`Lot`) do not wait for each other: another one is first in each iteration. With one turn of any kind in it, calls
on a direct connection waited for seconds behind uploads, whose turns cost less and so came more often.

The frames of a turn are few at first. They double while iterations are short, and are cut when one was long: some
frames cost 1 us and others, with the task that they start, a thousand times as much.

Times are those that the processor has spent on the event loop's thread. By a clock, iterations of 3 ms lasted 20 while
other processes kept the processors busy: turns shrank to few frames, calls waited for seconds, and nobody was faster.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from itertools import count
from typing import Protocol

# Length of an iteration of the event loop that a turn aims at. Calls on other connections wait about so long, and while
# others use the processor too.
_ITERATION_S = 0.005

# Turns follow each other in one iteration until they have taken so long.
_TURNS_S = 0.001

# A turn counts for its connection as at least, and at most, so much. Some take little, and cost an iteration, as those
# that only let the transport be read again; some take long by chance, as with a garbage collection.
_LEAST_S, _LONGEST_S = 0.000_25, _ITERATION_S

# What counts for a new connection before its first turn. With nothing, new ones without end would keep all others
# waiting.
_NEW_S = 0.001

# Frames of a turn. A call is two of them.
_FEWEST, _FIRST, _MOST = 16, 64, 512

AT_ONCE = 16
"""Frames that a connection handles at once while others wait for their turn, or after one that handled more in the same
iteration of the event loop: some calls, of a connection with few."""


PART_FRAMES, PART_S = 16, _ITERATION_S / 2
"""A connection stops early, and waits for its turn, once the frames after its first PART_FRAMES have taken PART_S.
Calls of an ensemble cost 0.5 ms each, and find turns of many frames after cheap calls."""


# A connection that sends little, and whose last data was no whole turn, is handled at once however long others have
# taken.
_CHEAP_BYTES, _CHEAP_S = 4096, _ITERATION_S / 2


class Lot(Enum):
    """Kind of connections, which wait for turns of their own: one kind does not delay another."""

    SHORT = 0
    """An Envoy's, with frames that are no much data: any number of turns in an iteration."""
    MUCH = 1
    """An Envoy's, with much data: one turn in an iteration."""
    DIRECT = 2
    """Others: one turn in an iteration."""


class Waiting(Protocol):
    """A connection with frames that wait."""

    lot: Lot
    used_s: float
    """Time that counts as used, in the count of its kind: 0 before its first turn as one of these."""

    def take_turn(self, frames: int) -> bool:
        """Handle some of them. Return False when there are none any more."""


class _Queue:
    """The connections of a kind that wait."""

    def __init__(self) -> None:
        # Time that each has used, number of its arrival.
        self._heap: list[tuple[float, int, Waiting]] = []
        self._numbers = count()
        # The most that a connection which had a turn had used before it. One that comes back has used as much: it saves
        # nothing.
        self._used_s = 0.0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, connection: Waiting, most_saved_s: float = 0.0) -> None:
        """Add a connection, which may have used so much less than others."""
        used_s = connection.used_s or self._used_s + _NEW_S
        # Of those that have used as much, the one that came first is next.
        heapq.heappush(self._heap, (max(self._used_s - most_saved_s, used_s), next(self._numbers), connection))

    def pop(self) -> tuple[float, Waiting]:
        """Remove the connection that has used least; return what it has used, and it."""
        used_s, _, connection = heapq.heappop(self._heap)
        self._used_s = max(self._used_s, used_s)
        return used_s, connection


class Turns:
    """Queue of the connections of one server."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self._queues = {lot: _Queue() for lot in Lot}
        # Kinds in the order of their turns, another one first in each iteration: a turn of one may take all its time.
        self._order = deque(Lot)
        # The connection that has its turn, and those that are to have another, after this iteration.
        self._taking: Waiting | None = None
        self._again: list[Waiting] = []
        self._frames = _FIRST
        self._is_scheduled = False
        self._began: float | None = None
        self._spent_s = 0.0
        self.at_once = self._frames
        """Frames that a connection handles at once when data arrives."""

    def wait(self, connection: Waiting) -> None:
        """Add a connection that has more frames than it may handle at once."""
        if connection is self._taking:
            self._again.append(connection)
            return
        self._queues[connection.lot].add(connection)
        if not self._is_scheduled:
            self._began = None
            self._schedule()

    def must_wait(self, size: int, last_s: float) -> bool:
        """Return True when `size` bytes must wait for a turn, of a connection whose last data took `last_s` seconds.

        That is so for costly data once what arrived since the last turn took as long as an iteration may: five hundred
        connections, each with a header of 55 kB, stopped the loop for a second.
        """
        return self._spent_s > _ITERATION_S and (size > _CHEAP_BYTES or last_s > _CHEAP_S)

    def spent_since(self, began: float) -> float:
        """Return the seconds since `began`, in which data of a connection was handled when it arrived; count them."""
        took_s = self.clock() - began
        self._spent_s += took_s
        return took_s

    def used(self) -> None:
        """A connection has handled many frames at once: until the next iteration, each other one handles few."""
        if not self._is_scheduled:
            self._began = self.clock()
            self._schedule()

    def _next(self) -> None:
        """Give the next connections their turns, until these have taken some time: of each kind, as many as it may."""
        now, self._spent_s = self.clock(), 0.0
        if self._began is not None:
            self._adapt(now - self._began)
        self._began = now
        self._order.rotate(1)
        try:
            for lot in self._order:
                if self._take_turns(lot, now + _TURNS_S):
                    break
        # A fault of one connection must not end the turns of the others.
        finally:
            for connection in self._again:
                # Its share of the iterations that it had with others is not saved up, either.
                self._queues[connection.lot].add(connection, _LONGEST_S)
            self._again.clear()
            if any(self._queues.values()):
                self._schedule()
            else:
                self._is_scheduled = False
                self.at_once = self._frames

    def _take_turns(self, lot: Lot, end: float) -> bool:
        """Give connections of a kind their turns. Return True when these have lasted beyond `end`."""
        queue = self._queues[lot]
        while queue:
            has_taken = self._take_turn(lot, queue)
            if self.clock() > end:
                return True
            if has_taken and lot is not Lot.SHORT:
                break
        return False

    def _take_turn(self, lot: Lot, queue: _Queue) -> bool:
        """Give the next connection its turn. Return False when it had none to take any more."""
        used_s, connection = queue.pop()
        # It was lost while it waited.
        if connection.lot is not lot:
            self._queues[connection.lot].add(connection)
            return False
        self._taking, began = connection, self.clock()
        try:
            return connection.take_turn(self._frames)
        finally:
            self._taking, took_s = None, self.clock() - began
            # It may have become one of another kind.
            if connection.lot is lot:
                connection.used_s = used_s + min(max(took_s, _LEAST_S), _LONGEST_S)

    def _schedule(self) -> None:
        self._is_scheduled = True
        asyncio.get_running_loop().call_soon(self._next)
        self.at_once = AT_ONCE

    def _adapt(self, took_s: float) -> None:
        if took_s > _ITERATION_S:
            self._frames = max(_FEWEST, int(self._frames * _ITERATION_S / took_s))
        elif took_s < _ITERATION_S / 2:
            self._frames = min(_MOST, self._frames * 2)
