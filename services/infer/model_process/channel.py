"""Channel of frames between the server and a model process, over a connected unix socket.

    frame    u32 bytes of header, u32 bytes of inline tensors, u64 bytes of tensors in a memory segment
    header   JSON, padded with spaces; "t" describes the tensors (see `payload`)
    tensors  small ones follow the header; larger ones are in an anonymous memory segment (memfd_create(2)) whose file
             descriptor is passed with the frame

A segment belongs to one frame and then to its receiver alone, who may write to it. The two sides never use a segment at
the same time, so no acknowledgement is needed. The kernel frees it with the last array that views it, however either
side ends. The segment's size is sealed: a peer that shrank it could crash the reader.
"""

from __future__ import annotations

import array
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from services.infer.model_process import payload
from services.infer.model_process.payload import Tensor, TensorPart

INLINE_BYTES = 1 << 16
"""Tensors up to this size go through the socket: that is cheaper than a segment, which takes some 30 us to create."""

_PREFIX = struct.Struct("<IIQ")
_MAX_HEADER_BYTES = 16 << 20
_MAX_SEGMENT_BYTES = 1 << 36
# The kernel's own bound is 1024.
_MAX_IOVECS = 512
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_NO_PADDING = bytes(payload.ALIGNMENT)
_FDS = socket.CMSG_SPACE(4 * array.array("i").itemsize)

# A thread unmaps the segments from this size on: 1 MiB takes 0.3 ms, for which the event loop would wait, and then for
# Python's lock, which unmapping gives up.
_LARGE_BYTES = 256 << 10
# Segments that wait for the thread. Beyond them, whoever drops a segment unmaps it.
_MAX_DROPPED = 64
_dropped: SimpleQueue[_Segment] | None = None


def unmap_in_thread() -> None:
    """Unmap the large segments that this process drops from now on in a thread."""
    global _dropped
    if _dropped is None:
        _dropped = SimpleQueue()
        threading.Thread(target=_unmap, args=(_dropped,), name="unmap", daemon=True).start()


def _unmap(dropped: SimpleQueue[_Segment]) -> None:
    while True:
        segment = dropped.get()
        del segment


class _Segment(mmap.mmap):
    """Memory of the tensors of one frame."""

    def __del__(self) -> None:
        """Give the segment to the thread, which drops it for good: this method is called once."""
        if _dropped is not None and len(self) >= _LARGE_BYTES and _dropped.qsize() < _MAX_DROPPED:
            _dropped.put(self)


class ChannelClosed(Exception):
    """The other end has closed the channel, or has sent an invalid frame."""

    def __init__(self, message: str, *, is_unread: bool = False) -> None:
        """`is_unread`: the other end closed with unread frames in its socket, as the kernel reports."""
        super().__init__(message)
        self.is_unread = is_unread


@dataclass(frozen=True)
class Message:
    """One received frame."""

    header: dict[str, Any]
    tensors: list[tuple[str, str, Tensor]]
    """Name, datatype and array of each tensor; the receiver owns the arrays and may write to them."""

    @property
    def op(self) -> str:
        """The operation that the frame requests or replies to."""
        return str(self.header.get("op", ""))

    @property
    def tensor_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(array.nbytes for _, _, array in self.tensors)

    def arrays(self) -> dict[str, Tensor]:
        return {name: array for name, _, array in self.tensors}


class Channel:
    """One end of a channel. Any thread may send; one thread at a time receives. All calls block."""

    def __init__(self, sock: socket.socket) -> None:
        """Own `sock`, which is connected and blocking."""
        self._socket = sock
        self._sending = threading.Lock()
        self._fds: deque[int] = deque()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, header: dict[str, Any], parts: Sequence[TensorPart] = ()) -> None:
        """Send one frame. Sets "t" in `header`.

        Raises:
            ChannelClosed: the other end is closed.
            OSError: there is no memory for the tensors.
        """
        starts, size = payload.layout(part.size_bytes for part in parts)
        header["t"] = [part.entry() for part in parts]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + _PREFIX.size) % payload.ALIGNMENT)
        if size <= INLINE_BYTES:
            data = b"".join((_PREFIX.pack(len(text), size, 0), text, *_chunks(parts, starts)))
            self._send(data, None)
            return
        fd = _segment(parts, starts, size)
        try:
            self._send(_PREFIX.pack(len(text), 0, size) + text, fd)
        finally:
            os.close(fd)

    def _send(self, data: bytes, fd: int | None) -> None:
        fds = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            with self._sending:
                sent = self._socket.sendmsg([data], fds)
                if sent < len(data):
                    self._socket.sendall(memoryview(data)[sent:])
        except OSError as err:
            raise ChannelClosed(f"the other end is closed: {err.strerror}", is_unread=True) from err

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Return the next frame; None when no frame has begun to arrive within `timeout_s`.

        Raises:
            ChannelClosed: no more frames will arrive.
        """
        if timeout_s is not None and not self._poll.poll(max(timeout_s * 1000, 0)):
            return None
        try:
            return self._receive()
        except ConnectionResetError as err:
            raise ChannelClosed("the other end is closed", is_unread=True) from err
        except (OSError, ValueError, TypeError, RecursionError) as err:
            raise ChannelClosed(f"the other end sent an invalid frame: {err}") from err

    def _receive(self) -> Message:
        text_bytes, inline_bytes, segment_bytes = _PREFIX.unpack(self._prefix())
        if text_bytes > _MAX_HEADER_BYTES or inline_bytes > INLINE_BYTES or segment_bytes > _MAX_SEGMENT_BYTES:
            raise ValueError("the frame is too large")
        memory = memoryview(bytearray(text_bytes + inline_bytes))
        self._fill(memory)
        header = _header_of(bytes(memory[:text_bytes]))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        tensors = self._mapped(segment_bytes) if segment_bytes else memory[text_bytes:]
        return Message(header, payload.read(header.get("t"), tensors))

    def _prefix(self) -> bytes:
        data = b""
        while len(data) < _PREFIX.size:
            # File descriptors arrive with the first byte of their frame.
            more, ancillary, _, _ = self._socket.recvmsg(_PREFIX.size - len(data), _FDS, socket.MSG_CMSG_CLOEXEC)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                    self._fds.extend(numbers)
            if not more:
                raise ChannelClosed("the other end is closed")
            data += more
        return data

    def _fill(self, memory: memoryview) -> None:
        at = 0
        while at < len(memory):
            got = self._socket.recv_into(memory[at:])
            if not got:
                raise ChannelClosed("the other end is closed")
            at += got

    def _mapped(self, size: int) -> memoryview:
        if not self._fds:
            raise ValueError("the frame has no segment")
        fd = self._fds.popleft()
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != size:
                raise ValueError("the segment is not sealed, or has another size")
            return memoryview(_Segment(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
        finally:
            os.close(fd)

    def shut(self) -> None:
        """Shut down both directions, from any thread: threads that wait on either end wake up."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket and unclaimed descriptors. No thread may use the channel after that."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.popleft())


def _chunks(parts: Sequence[TensorPart], starts: Sequence[int]) -> Iterator[Any]:
    at = 0
    for part, start in zip(parts, starts, strict=True):
        if start > at:
            yield _NO_PADDING[: start - at]
        yield from part.chunks
        at = start + part.size_bytes


def _segment(parts: Sequence[TensorPart], starts: Sequence[int], size: int) -> int:
    """Return a file descriptor of a memory segment with the tensors."""
    # Written rather than mapped: that avoids a page fault for each fresh page.
    fd = os.memfd_create("shoal-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part, start in zip(parts, starts, strict=True):
            _write(fd, [memoryview(chunk) for chunk in part.chunks if len(chunk)], start)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, chunks: list[memoryview], at: int) -> None:
    while chunks:
        some = chunks[:_MAX_IOVECS]
        written = os.pwritev(fd, some, at)
        at += written
        while chunks and written >= len(chunks[0]):
            written -= len(chunks.pop(0))
        if chunks and written:
            chunks[0] = chunks[0][written:]


def _header_of(text: bytes) -> Any:
    """Return the value of a JSON text. Surrogates, as in a model's error, are `?`: no message carries them."""
    header = json.loads(text)
    if b"\\ud" in text:
        header = json.loads(json.dumps(header, ensure_ascii=False).encode(errors="replace"))
    return header
