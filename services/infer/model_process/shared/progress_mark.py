"""Progress mark: shared memory in which an owner records the batch that runs for one connection, and since when.

The memory outlives the owner, so an infer process can tell after a crash whether its batch was running. Both sides map
it, which saves a message for each batch. The owner writes; the infer process reads.
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
    """Progress mark of one connection."""

    def __init__(self, fd: int) -> None:
        """Map the memory segment `fd` and close `fd`."""
        try:
            self._memory = mmap.mmap(fd, _BYTES)
        finally:
            os.close(fd)

    @classmethod
    def sent(cls, sock: socket.socket) -> ProgressMark:
        """Create a mark and send its memory to the owner, as the first message on `sock`. Raises OSError."""
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
        """Receive the mark that the peer has sent. Raises OSError or ValueError when the peer sent none."""
        _, fds, _, _ = socket.recv_fds(sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise ValueError("the peer did not send a progress mark first")
        return cls(fds[0])

    def begin(self, now_ns: int, *, is_together: bool) -> None:
        """Record that a batch of this connection runs from `now_ns` on (monotonic clock)."""
        self._memory[_TOGETHER] = is_together
        self._memory[: _STARTED.size] = _STARTED.pack(now_ns)

    def accompany(self) -> None:
        """Record that a batch of another connection runs at the same time."""
        self._memory[_TOGETHER] = 1

    def end(self) -> None:
        """Record that no batch of this connection is running."""
        self._memory[: _STARTED.size] = bytes(_STARTED.size)

    @property
    def started_ns(self) -> int:
        """Start time of the running batch; 0: no batch is running, or none was when the owner died."""
        started: int = _STARTED.unpack_from(self._memory)[0]
        return started

    @property
    def is_together(self) -> bool:
        """True when batches of other connections run, or ran, at the same time."""
        return bool(self._memory[_TOGETHER])
