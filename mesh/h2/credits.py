"""Credit for the bodies on a shared connection: the senders of large bodies take turns.

    body ──first SHARED_WINDOW bytes──> read
         └──more──> queue of its sender ──turn, while less than GIVEN_BYTES are on their way──> WINDOW_UPDATE

A body that is alone, or one of few, gets a larger window: with 64 KiB, one of 16 MiB costs a third more.

An Envoy sends a frame of each body that has credit, one after the other: a small body waits for 5 MB beside 300 large
ones. So few bodies have credit at a time. A sender that has none always gets its turn, whatever others have. Credit
that is not used for a while, since the client sends nothing, holds up nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Protocol

SHARED_WINDOW = 64 << 10
"""Bytes of a body that a shared connection may send without a turn."""

STEP_BYTES = 32 << 10
"""A body waits for a turn when so many bytes of it have been consumed since its last one; more with a larger window."""

GIVEN_BYTES = 1 << 20
"""Credit that is given and not used, of all bodies; each sender may have one more. At 100 MB/s a small body
waits 10 ms."""

# Credit that is older is no longer counted; at most twice as old.
_UNUSED_S = 0.1


class Body(Protocol):
    """A body that waits for credit."""

    number: int
    extra: int
    """Bytes by which the window is larger than at first."""

    @property
    def sender(self) -> Hashable: ...

    def give_credit(self, extra: int) -> int:
        """Give back the credit of what was consumed, and let the window be `extra` bytes larger than at first.

        Return the bytes that may still come; 0 when no more of the body is expected.
        """


class _Entry:
    """A body that waits for credit, or has some."""

    __slots__ = ("body", "extra", "given", "is_old", "is_waiting", "sender")

    def __init__(self, body: Body) -> None:
        self.body = body
        self.sender = body.sender
        self.is_waiting = self.is_old = False
        # Bytes that may come since the last turn, as far as they are counted.
        self.given = 0
        # Bytes by which the window is larger than at first. They cannot be taken back.
        self.extra = 0


class Credits:
    """Credit of the streams of one connection."""

    def __init__(self) -> None:
        self.bodies: dict[int, _Entry] = {}
        """Bodies that wait or have had a turn, by stream."""
        # Those that wait, by sender; senders in the order of their turns.
        self._waiting: dict[Hashable, dict[int, _Entry]] = {}
        # Senders of `_waiting` that have no credit. One turn is theirs, whatever others have.
        self._without: dict[Hashable, None] = {}
        # Bodies with counted credit, by sender.
        self._with: dict[Hashable, int] = {}
        self._bytes = self._extra_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def is_waiting(self, number: int) -> bool:
        """Return True while a stream waits for its turn."""
        entry = self.bodies.get(number)
        return entry is not None and entry.is_waiting

    def wait(self, body: Body) -> None:
        """Let a body wait for its turn, which may be now."""
        entry = self.bodies.get(body.number)
        if entry is None:
            entry = self.bodies[body.number] = _Entry(body)
        elif entry.is_waiting:
            return
        entry.is_waiting = True
        self._waiting.setdefault(entry.sender, {})[body.number] = entry
        if entry.sender not in self._with:
            self._without[entry.sender] = None
        self._give()

    def arrived(self, number: int, size: int) -> None:
        """Count `size` bytes of a stream that is in `bodies`."""
        entry = self.bodies[number]
        if entry.given:
            self._uncount(entry, min(size, entry.given))
            self._give()

    def ended(self, number: int) -> None:
        """Forget a stream that is in `bodies`: its request has ended."""
        entry = self.bodies.pop(number)
        self._extra_bytes -= entry.extra
        if entry.is_waiting:
            self._take(entry)
        if entry.given:
            self._uncount(entry, entry.given)
        self._give()

    def close(self) -> None:
        """Give no more credit."""
        for entries in (self.bodies, self._waiting, self._without):
            entries.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _take(self, entry: _Entry) -> None:
        """Remove a body from those that wait, and let its sender be the last one to have another turn."""
        entry.is_waiting = False
        of_sender = self._waiting.pop(entry.sender)
        del of_sender[entry.body.number]
        if of_sender:
            self._waiting[entry.sender] = of_sender
        else:
            self._without.pop(entry.sender, None)

    def _uncount(self, entry: _Entry, size: int) -> None:
        self._bytes -= size
        entry.given -= size
        if entry.given:
            return
        if self._with[entry.sender] > 1:
            self._with[entry.sender] -= 1
            return
        del self._with[entry.sender]
        if entry.sender in self._waiting:
            self._without[entry.sender] = None

    def _give(self) -> None:
        while self._without or (self._waiting and self._bytes < GIVEN_BYTES):
            sender = next(iter(self._waiting if self._bytes < GIVEN_BYTES else self._without))
            entry = next(iter(self._waiting[sender].values()))
            self._take(entry)
            extra = self._extra(entry)
            left = entry.body.give_credit(extra)
            self._extra_bytes += entry.body.extra - entry.extra
            entry.extra, entry.is_old = entry.body.extra, False
            if not left:
                continue
            if not entry.given:
                self._with[sender] = self._with.get(sender, 0) + 1
                self._without.pop(sender, None)
            self._bytes += left - entry.given
            entry.given = left
        if self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_UNUSED_S, self._forget_unused)

    def _extra(self, entry: _Entry) -> int:
        """Return the bytes that a window is to be larger than at first: few bodies share half of all credit."""
        if self._waiting:
            return 0
        fair = GIVEN_BYTES // 2 // (len(self._with) + (entry.sender not in self._with)) - SHARED_WINDOW
        free = GIVEN_BYTES - self._bytes + entry.given - SHARED_WINDOW
        return max(min(fair, free, GIVEN_BYTES // 2 - self._extra_bytes + entry.extra), 0)

    def _forget_unused(self) -> None:
        """Stop counting the credit that has not been used for a while: its clients send nothing."""
        self._timer = None
        for entry in list(self.bodies.values()):
            if entry.is_old and entry.given:
                self._uncount(entry, entry.given)
            entry.is_old = True
        self._give()
