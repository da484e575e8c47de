"""An owner's end of a connection: to one instance of a model in one infer process, which has one batch under way."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.shared.progress_mark import ProgressMark

_SEND_S = 10
# What does not read for so long has stopped: an answer that it does not take must not hold up others.
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """Any thread may send; its own thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        """Owns `sock`. Raises OSError or ValueError when what connected is no infer process."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
        given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.worker: int = _CREDENTIALS.unpack(given)[0]
        """The infer process."""
        self._mark = ProgressMark.received(sock)
        self.channel = Channel(sock)
        self.is_gone = False
        """Nobody waits at its other end any more."""
        self._under_way = 0

    def send(self, header: Mapping[str, Any], parts: Sequence[TensorPart] = ()) -> None:
        """Sends, if there is still somebody."""
        try:
            self.channel.send(dict(header), parts)
        except (ChannelClosed, OSError):
            self.channel.shut()  # Its thread hears of it, and sees to the rest.

    def close(self) -> None:
        """Ends it. Its thread is done; others may try to send, in vain."""
        self.channel.shut()
        self.channel.close()

    def begin(self, now_ns: int, *, is_together: bool) -> None:
        """Something of it is executed from now on."""
        self._under_way += 1
        self._mark.begin(now_ns, is_together=is_together)

    def accompany(self) -> None:
        """Something of another connection is executed, too."""
        self._mark.accompany()

    def end(self) -> None:
        """What has begun is over."""
        self._under_way -= 1
        if not self._under_way:
            self._mark.end()
