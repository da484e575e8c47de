"""Outgoing half of a connection: frames are collected and written together, and data keeps to the peer's windows.

    respond, request ──fits──> out ──once an iteration of the loop──> transport
           └──does not──> waiting, by stream ──WINDOW_UPDATE──> out

The room of a stream is the initial window of the peer's settings plus the stream's own change since it was opened.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping

from mesh.h2 import frames
from mesh.h2.frames import (
    CONTINUATION,
    DATA,
    DEFAULT_FRAME,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    LARGEST_WINDOW,
    ConnectionBroken,
    Reason,
)

log = logging.getLogger(__name__)

# Acknowledgements of PING and SETTINGS that a peer may leave unread: each of them costs memory.
_MAX_UNREAD = 1000

_LAST = END_HEADERS | END_STREAM


class Outgoing:
    """Data of one stream that waits for a window; then `after`, the frames that end the stream, if any."""

    __slots__ = ("after", "chunks", "on_sent")

    def __init__(self) -> None:
        self.chunks: deque[memoryview] = deque()
        self.after = b""
        self.on_sent: Callable[[], None] | None = None

    def report_sent(self) -> None:
        """Call `on_sent`. An exception in it must not harm other streams."""
        if self.on_sent is None:
            return
        try:
            self.on_sent()
        except Exception:
            log.exception("a callback of a stream's sender failed")


class Sender:
    """Sends to one peer. Calls for a stream that is not open send nothing, except that `request` needs an open stream.

    Args:
        ended: called for each stream whose sending side has ended; with a reason when it was reset.
    """

    def __init__(self, ended: Callable[[int, Reason | None], None]) -> None:
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._will_flush = False
        self._window_changes: dict[int, int] = {}
        self._waiting: dict[int, Outgoing] = {}
        self._window = self._initial_window = frames.DEFAULT_WINDOW
        self._frame = DEFAULT_FRAME
        self._is_paused = False
        self._unread = 0

    def attach(self, transport: asyncio.Transport) -> None:
        """Set the transport. Called before anything is written."""
        self._transport = transport

    def open(self, number: int) -> None:
        """Add a stream."""
        self._window_changes[number] = 0

    def is_open(self, number: int) -> bool:
        """Return True when a stream is open for sending."""
        return number in self._window_changes

    def forget(self, number: int) -> None:
        """Drop a stream and its unsent data."""
        self._window_changes.pop(number, None)
        outgoing = self._waiting.pop(number, None)
        if outgoing is not None:
            outgoing.report_sent()

    def has_unsent(self, number: int) -> bool:
        """Return True when data of a stream waits for a window."""
        return number in self._waiting

    def close(self) -> None:
        """Drop all streams: the connection is lost."""
        for number in list(self._window_changes):
            self.forget(number)

    # -- the transport

    def write(self, data: bytes) -> None:
        """Add frames to the data that is written at the end of this iteration of the event loop."""
        self._out.append(data)
        if not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write everything that was added, in one piece."""
        self._will_flush = False
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            if not self._transport.is_closing():
                self._transport.write(data)

    def acknowledge(self, data: bytes) -> None:
        """Write an acknowledgement. Raises ConnectionBroken for a peer that asks for many and reads none."""
        self.write(data)
        self._unread += self._is_paused
        if self._unread > _MAX_UNREAD:
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM, f"{_MAX_UNREAD} acknowledgements were requested and not read"
            )

    def pause(self) -> None:
        """Hold back data that waits for a window: the transport's buffer is full.

        Headers, small whole requests and responses, and acknowledgements are written nevertheless.
        """
        self._is_paused = True

    def resume(self) -> None:
        """Send waiting data again."""
        self._is_paused = False
        self._unread = 0
        self._pump()

    # -- the peer's windows

    def apply_settings(self, settings: Mapping[int, int]) -> None:
        """Apply the peer's settings, by number. Raises ConnectionBroken for invalid values."""
        window, frame = settings.get(frames.WINDOW_SIZE), settings.get(frames.FRAME_SIZE)
        if window is not None:
            if window > LARGEST_WINDOW:
                raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"a window of {window}")
            self._initial_window = window
        if frame is not None:
            if not DEFAULT_FRAME <= frame <= frames.LARGEST_FRAME:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"frames of {frame}")
            self._frame = frame
        self._pump()

    def add_window(self, number: int, size: int) -> None:
        """Apply a WINDOW_UPDATE; stream 0 is the connection. Raises ConnectionBroken."""
        if not number:
            self._window += size
            if self._window > LARGEST_WINDOW:
                raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, "the connection's window is too large")
        elif number in self._window_changes:
            self._window_changes[number] += size
            if self._room(number) > LARGEST_WINDOW:
                self.reset(number, Reason.FLOW_CONTROL_ERROR)
        self._pump()

    def _room(self, number: int) -> int:
        return self._initial_window + self._window_changes[number]

    # -- requests and responses

    def respond(self, number: int, head: bytes, body: bytes, trailers: bytes) -> None:
        """Send a whole response: its head, its body if any, its trailers if any."""
        if number not in self._window_changes:
            return
        size, opening = len(body), frames.opening
        fits = size <= self._frame and size <= self._window and size <= self._room(number)
        if trailers and fits and len(head) + len(trailers) <= DEFAULT_FRAME:
            # The common case: no function calls but these.
            self._window -= size
            self.write(opening(HEADERS, END_HEADERS, number, len(head)) + head + opening(DATA, 0, number, size))
            self._out += (body, opening(HEADERS, _LAST, number, len(trailers)) + trailers)
            self._end(number)
            return
        if not size and not trailers:
            self.write(_header_frames(number, head, is_last=True))
            self._end(number)
            return
        self.write(_header_frames(number, head))
        if size:
            self._send(number, body, b"", None)
        if trailers:
            self.end(number, trailers)
        else:
            self.end_data(number)

    def request(self, number: int, head: bytes, body: bytes) -> None:
        """Send a whole request on an open stream: its head, and a body that ends our side.

        Raises KeyError for a stream that is not open.
        """
        size = len(body)
        self.headers(number, head)
        if size <= self._frame and size <= self._window and size <= self._room(number):
            self._window -= size
            self._out += (frames.opening(DATA, END_STREAM, number, size), body)
            self._end(number)
            return
        self._send(number, body, frames.opening(DATA, END_STREAM, number, 0), None)

    def headers(self, number: int, head: bytes) -> None:
        """Send the head of a request or a response whose data follows."""
        if number in self._window_changes:
            self.write(_header_frames(number, head))

    def data(self, number: int, data: bytes, on_sent: Callable[[], None]) -> None:
        """Send data as windows allow. `on_sent` is called when all of it is written, or the stream is closed."""
        if number in self._window_changes:
            self._send(number, data, b"", on_sent)
        else:
            on_sent()

    def end(self, number: int, trailers: bytes) -> None:
        """End a stream with trailers, after its data."""
        self._finish(number, _header_frames(number, trailers, is_last=True))

    def end_data(self, number: int) -> None:
        """End a stream that has no trailers, after its data."""
        self._finish(number, frames.opening(DATA, END_STREAM, number, 0))

    def reset(self, number: int, reason: Reason) -> None:
        """End a stream with RST_STREAM."""
        if number in self._window_changes:
            self.forget(number)
            self.write(frames.rst_stream(number, reason))
            self._ended(number, reason)

    def _finish(self, number: int, last: bytes) -> None:
        if number in self._waiting:
            self._send(number, b"", last, None)
        elif number in self._window_changes:
            self.write(last)
            self._end(number)

    def _end(self, number: int) -> None:
        del self._window_changes[number]
        self._ended(number, None)

    def _send(self, number: int, data: bytes, after: bytes, on_sent: Callable[[], None] | None) -> None:
        outgoing = self._waiting.setdefault(number, Outgoing())
        if data:
            outgoing.chunks.append(memoryview(data))
        outgoing.after += after
        outgoing.on_sent = on_sent or outgoing.on_sent
        self._pump()

    def _pump(self) -> None:
        """Send as much of the waiting data as the windows allow."""
        for number in list(self._waiting):
            if self._window <= 0 or self._is_paused:
                return
            # The callback of another stream may have dropped this one.
            if (outgoing := self._waiting.get(number)) is None:
                continue
            while outgoing.chunks and self._window > 0:
                chunk = outgoing.chunks[0]
                size = min(self._frame, self._window, self._room(number), len(chunk))
                if size <= 0:
                    break
                self.write(frames.opening(DATA, 0, number, size) + bytes(chunk[:size]))
                self._window -= size
                self._window_changes[number] -= size
                if size == len(chunk):
                    outgoing.chunks.popleft()
                else:
                    outgoing.chunks[0] = chunk[size:]
            if not outgoing.chunks:
                del self._waiting[number]
                if outgoing.after:
                    self.write(outgoing.after)
                    self._end(number)
                outgoing.report_sent()


def _header_frames(number: int, block: bytes, *, is_last: bool = False) -> bytes:
    """HEADERS, and CONTINUATION for a block that is longer than a frame. `is_last`: nothing follows on the stream."""
    end_stream = END_STREAM if is_last else 0
    if len(block) <= DEFAULT_FRAME:
        return frames.opening(HEADERS, END_HEADERS | end_stream, number, len(block)) + block
    pieces = [block[at : at + DEFAULT_FRAME] for at in range(0, len(block), DEFAULT_FRAME)]
    first, *middle, last = pieces
    found = [frames.frame(HEADERS, end_stream, number, first)]
    found += [frames.frame(CONTINUATION, 0, number, piece) for piece in middle]
    found.append(frames.frame(CONTINUATION, END_HEADERS, number, last))
    return b"".join(found)
