"""Memory of a request: bytes that its server counts, from the request's first frame to its end.

RequestMemory (a call) <── RequestPart (one request of several in a call): hold, release, close
"""

from __future__ import annotations

from collections.abc import Hashable

from mesh.rpc.call_context import RequestMemory


class Uncounted:
    """Memory of calls without an account."""

    message_bytes = 0
    sender: Hashable = None
    room = 1 << 62

    def hold(self, size: int) -> None:
        pass

    def hold_response(self, size: int) -> None:
        pass

    def release(self, size: int) -> None:
        pass


UNCOUNTED = Uncounted()


class RequestPart:
    """Memory of one request in a call with several. Closed when the request has ended."""

    __slots__ = ("_is_closed", "_memory", "_waits", "held", "message_bytes")

    def __init__(self, memory: RequestMemory, message_bytes: int = 0, *, waits: bool = False) -> None:
        """Store the memory of the call, and the size of the request's message; nothing is held yet.

        `waits`: the response may wait for the client. It gets no more room than the request.
        """
        self._memory = memory
        self._waits = waits
        self.message_bytes = message_bytes
        self.held = 0
        self._is_closed = False

    @property
    def sender(self) -> Hashable:
        """The sender of the call."""
        return self._memory.sender

    @property
    def room(self) -> int:
        """Bytes that `hold_response` may count now."""
        return self._memory.room

    def hold(self, size: int) -> None:
        """Count `size` bytes more. Counts nothing after the end. Raises ResourceExhausted when there is no room."""
        if not self._is_closed:
            self._memory.hold(size)
            self.held += size

    def hold_response(self, size: int) -> None:
        """Count `size` bytes of a response, as `hold`. It may take all that is free, unless it may wait."""
        if self._waits:
            self.hold(size)
        elif not self._is_closed:
            self._memory.hold_response(size)
            self.held += size

    def release(self, size: int) -> None:
        """Release bytes that were held. Does nothing after the end."""
        if not self._is_closed:
            self.held -= size
            self._memory.release(size)

    def close(self) -> None:
        """Release everything. Does nothing the second time."""
        if not self._is_closed:
            self._is_closed = True
            self._memory.release(self.held)
