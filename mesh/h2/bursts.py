"""Waiting data that the connections of a server write in one iteration of the event loop: they take turns.

Without a bound over all of them, the connections of 240 clients that begin to read wrote 240 MiB in one iteration.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

BURST_BYTES = 2 << 20
"""Taken in one iteration by all connections together: 1 MiB takes 0.3 to 0.6 ms. Twice as much may reach the sockets in
one iteration, since a connection writes at the end of its turn or in the next iteration."""


class Bursts:
    """Turns of a server's connections, or of one client's."""

    def __init__(self) -> None:
        self.left = BURST_BYTES
        """Bytes that may still be written in this iteration."""
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_scheduled = False

    def take(self, size: int) -> None:
        """Count `size` bytes that are written."""
        self.left -= size
        self._schedule()

    def wait(self, resume: Callable[[], None]) -> None:
        """Call `resume` in the next iteration, or in a later one when others before it write much."""
        self._waiting.append(resume)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._is_scheduled = False
        self.left = BURST_BYTES
        try:
            # A connection that is not done waits again, behind the others.
            for _ in range(len(self._waiting)):
                if self.left <= 0:
                    break
                self._waiting.popleft()()
        # A fault of one connection must not end the turns of the others.
        finally:
            if self._waiting:
                self._schedule()
