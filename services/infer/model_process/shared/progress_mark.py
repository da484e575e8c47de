"""What an owner is doing for one connection, in memory that outlives it: whose batch ran when it died, and since when.

Both sides map it: no message says so, which would cost one for each batch. The owner writes, the infer process reads.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct

_BYTES = 16
_STARTED = struct.Struct("<Q")
_TOGETHER = _STARTED.size
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ProgressMark:
    """Of one connection."""

    def __init__(self, fd: int) -> None:
        """Owns `fd`, which is of the memory."""
        try:
            self._memory = mmap.mmap(fd, _BYTES)
        finally:
            os.close(fd)

    @classmethod
    def sent(cls, sock: socket.socket) -> ProgressMark:
        """A new one, given to the owner at the other end of `sock`, before anything else. Raises OSError."""
        fd = os.memfd_create("shoal-mark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            socket.send_fds(sock, [b"\0"], [fd])
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    @classmethod
    def received(cls, sock: socket.socket) -> ProgressMark:
        """The one that the other end has sent. Raises OSError or ValueError when there is none."""
        _, fds, _, _ = socket.recv_fds(sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise ValueError("a connection begins with its mark")
        return cls(fds[0])

    def begin(self, now_ns: int, *, is_together: bool) -> None:
        """A batch of this connection is executed from `now_ns` on, of the monotonic clock."""
        self._memory[_TOGETHER] = is_together
        self._memory[: _STARTED.size] = _STARTED.pack(now_ns)

    def accompany(self) -> None:
        """Another one's batch is executed beside it."""
        self._memory[_TOGETHER] = 1

    def end(self) -> None:
        """Nothing of this connection is executed any more."""
        self._memory[: _STARTED.size] = bytes(_STARTED.size)

    @property
    def started_ns(self) -> int:
        """When the batch that is executed began; 0: none is, or was when the owner died."""
        started: int = _STARTED.unpack_from(self._memory)[0]
        return started

    @property
    def is_together(self) -> bool:
        """Whether what others sent was executed at the same time."""
        return bool(self._memory[_TOGETHER])
