"""Owner's end of a connection to one model instance in one infer process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.shared.progress_mark import ProgressMark

# A peer that does not read for so long is stuck: its unread response must not delay other connections.
_SEND_S = 10
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """One accepted connection. Any thread may send; the connection's own thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        """Own `sock`. Raises OSError or ValueError when the peer is not an infer process."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.worker: int = _CREDENTIALS.unpack(credentials)[0]
        """Process id of the infer process."""
        self._mark = ProgressMark.received(sock)
        self.channel = Channel(sock)
        self.is_disconnected = False
        """True once the infer process has disconnected."""
        self._running = 0

    def send(self, header: Mapping[str, Any], parts: Sequence[TensorPart] = ()) -> None:
        """Send a frame. A failure shuts the channel and is not raised."""
        try:
            self.channel.send(dict(header), parts)
        # The connection's own thread receives the end of the channel and cleans up.
        except (ChannelClosed, OSError):
            self.channel.shut()

    def close(self) -> None:
        """Close the connection, after its own thread has ended. A later `send` has no effect."""
        self.channel.shut()
        self.channel.close()

    def begin(self, now_ns: int, *, is_together: bool) -> None:
        """Record that a batch of this connection runs from `now_ns` on; see ProgressMark."""
        self._running += 1
        self._mark.begin(now_ns, is_together=is_together)

    def accompany(self) -> None:
        """Record that a batch of another connection runs at the same time."""
        self._mark.accompany()

    def end(self) -> None:
        """Record that a batch of this connection has ended."""
        self._running -= 1
        if not self._running:
            self._mark.end()
