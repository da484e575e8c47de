"""Memory of a call with one request, in the account of its stream."""

from __future__ import annotations

from mesh.h2.memory_account import Share
from mesh.h2.stream import ServerStream
from mesh.rpc.framing import no_memory


class StreamMemory:
    """RequestMemory of a call (mesh.rpc.call_context); its base class. The call sets both attributes."""

    __slots__ = ("_stream", "is_over")

    _stream: ServerStream
    is_over: bool
    """True when the call has ended: the stream has released what it held."""

    @property
    def sender(self) -> Share:
        """The share of the memory that the tenant has on its connection, as identity of both."""
        return self._stream.share

    def hold(self, size: int) -> None:
        """Count `size` bytes more of memory until the call ends. Raises ResourceExhausted when there is no room."""
        if not self._stream.reserve(size):
            raise no_memory()

    def hold_response(self, size: int) -> None:
        """Count `size` bytes of a response that is being written, as `hold`. It may take all that is free."""
        if not self._stream.reserve(size, is_response=True):
            raise no_memory()

    def release(self, size: int) -> None:
        """Release bytes that were held, before the call ends. Does nothing after the end."""
        if not self.is_over:
            self._stream.release(size)
