"""Heartbeats of a streamed response: bytes that its reader ignores, so that silence means a lost connection."""

from __future__ import annotations

import asyncio

from mesh.h2.stream import ServerStream

HEARTBEAT_S = 15.0
"""Pause before a heartbeat. Proxies end responses without data after 60 s (nginx, many load balancers)."""


class Heartbeats:
    """Heartbeats of one response. The caller stops them while it sends, and at the response's end."""

    def __init__(self, stream: ServerStream, heartbeat: bytes) -> None:
        """Store the bytes of a heartbeat; empty: there are none."""
        self._stream = stream
        self._heartbeat = heartbeat
        self._timer: asyncio.TimerHandle | None = None
        self._is_on = False

    def start(self) -> None:
        """Send a heartbeat after each pause, until they are stopped."""
        if self._heartbeat:
            self._is_on = True
            self._wait()

    def stop(self) -> None:
        """Send no more of them until the next start."""
        self._is_on = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        # Also called when a heartbeat from before the last start is written.
        if self._is_on and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    def _beat(self) -> None:
        self._timer = None
        # The next one waits until this one is written: of a client that does not read, one is kept.
        if self._stream.has_room(len(self._heartbeat)):
            self._stream.send(self._heartbeat, self._wait)
