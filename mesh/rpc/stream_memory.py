"""Memory of a call with one request, in the account of its stream."""

from __future__ import annotations

from collections.abc import Hashable

from mesh.h2.stream import ServerStream
from mesh.rpc.framing import no_memory


class StreamMemory:
    """RequestMemory of a call (mesh.rpc.call_context); its base class. The call sets both attributes."""

    __slots__ = ("_stream", "is_over")

    _stream: ServerStream
    is_over: bool
    """True when the call has ended: the stream has released what it held."""

    @property
    def sender(self) -> Hashable:
        """Identity of the tenant and its connection, behind Envoy of its connection to Envoy."""
        return self._stream.sender

    @property
    def room(self) -> int:
        """Bytes that `hold_response` may count now."""
        return self._stream.share.free

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
