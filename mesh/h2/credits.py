"""Credit for the bodies on a shared connection: the senders of large bodies take turns.

    body ──first SHARED_WINDOW bytes──> read
         └──more──> queue of its sender ──turn, while less than GIVEN_BYTES are on their way──> WINDOW_UPDATE

A body that is alone, or one of few, gets a larger window: with 64 KiB, one of 16 MiB costs a third more.

An Envoy sends a frame of each body that has credit, one after the other: with 300 large bodies, a small one waited for
5 MB. So few bodies have credit at a time. Credit that is not used for a while, since the client sends nothing, holds
up nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Protocol

SHARED_WINDOW = 64 << 10
"""Bytes of a body that a shared connection may send without a turn."""

STEP_BYTES = 32 << 10
"""A body waits for a turn when so many bytes of it have been consumed since its last one; more with a larger window."""

GIVEN_BYTES = 1 << 20
"""Credit that is given and not used, of all bodies. At 100 MB/s, a small body waits 10 ms for it."""

# Credit that is older is no longer counted; at most twice as old.
_UNUSED_S = 0.1


class Body(Protocol):
    """A body that waits for credit."""

    number: int

    @property
    def sender(self) -> Hashable: ...

    def give_credit(self, extra: int) -> int:
        """Give back the credit of what was consumed, and let the window be `extra` bytes larger than at first.

        Return the bytes that may still come; 0 when no more of the body is expected.
        """


class Credits:
    """Credit of the streams of one connection."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[Body]] = {}
        self._numbers: set[int] = set()
        self._bytes = 0
        self.given: dict[int, int] = {}
        """Bytes that may come of a stream since its last turn, by stream."""
        self._older: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    def is_waiting(self, number: int) -> bool:
        """Return True while a stream waits for its turn."""
        return number in self._numbers

    def wait(self, body: Body) -> None:
        """Let a body wait for its turn, which may be now."""
        if body.number in self._numbers:
            return
        self._numbers.add(body.number)
        self._waiting.setdefault(body.sender, deque()).append(body)
        self._give()

    def arrived(self, number: int, size: int) -> None:
        """Count `size` bytes of a stream that is in `given`."""
        left = self.given[number] - size
        if left > 0:
            self.given[number] = left
            self._bytes -= size
        else:
            self._bytes -= self.given.pop(number)
        self._give()

    def ended(self, number: int) -> None:
        """Count a stream that is in `given` no more: its request has ended."""
        self._bytes -= self.given.pop(number)
        self._give()

    def close(self) -> None:
        """Give no more credit."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _give(self) -> None:
        waiting = self._waiting
        while waiting and self._bytes < GIVEN_BYTES:
            sender = next(iter(waiting))
            bodies = waiting.pop(sender)
            body = bodies.popleft()
            if bodies:
                waiting[sender] = bodies
            self._numbers.discard(body.number)
            if size := body.give_credit(self._extra(body.number)):
                self._bytes += size - self.given.get(body.number, 0)
                self.given[body.number] = size
                self._older.discard(body.number)
        if waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_UNUSED_S, self._forget_unused)

    def _extra(self, number: int) -> int:
        """Return the bytes that the window of a stream is larger than at first: few bodies share half of all credit."""
        if self._waiting:
            return 0
        others = len(self.given) - (number in self.given)
        return max(GIVEN_BYTES // 2 // (others + 1) - SHARED_WINDOW, 0)

    def _forget_unused(self) -> None:
        self._timer = None
        for number in self._older & self.given.keys():
            self._bytes -= self.given.pop(number)
        self._older = set(self.given)
        self._give()
