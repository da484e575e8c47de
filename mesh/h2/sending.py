"""What goes to one peer: whole answers and requests in one write, and data as far as the peer's windows reach.

    answer, request ──fits──> out ──once a turn of the loop──> transport
           └──does not──> waiting, by stream ──a window opens──> out

Every stream has the window that the peer's settings give, and what it was widened or used by since it was opened.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from mesh.asgi import status
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
from mesh.h2.headers import encode

_UNREAD = 1000
# Answers to PING and SETTINGS that the peer does not read: each would cost memory.

_ANSWER = encode([(b":status", b"200"), status.CONTENT_TYPE])
_END = encode(status.OK)

_LAST = END_HEADERS | END_STREAM


class Outgoing:
    """Data of one stream that has to wait for a window; then `after`, the frame that ends the stream, if any."""

    __slots__ = ("after", "chunks", "on_sent")

    def __init__(self) -> None:
        self.chunks: deque[memoryview] = deque()
        self.after = b""
        self.on_sent: Callable[[], None] | None = None


class Sender:
    """Sends to one peer. What it is told of a stream that is not open (any more) is dropped.

    Args:
        ended: hears of each stream that has ended on our side; with a reason, when that was without a status.
    """

    def __init__(self, ended: Callable[[int, Reason | None], None]) -> None:
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._will_flush = False
        self._widened: dict[int, int] = {}
        self._waiting: dict[int, Outgoing] = {}
        self._window = self._stream_window = frames.DEFAULT_WINDOW
        self._frame = DEFAULT_FRAME
        self._is_paused = False
        self._unread = 0

    def begin(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def open(self, number: int) -> None:
        """A stream has been opened."""
        self._widened[number] = 0

    def forget(self, number: int) -> None:
        """Nobody waits for what this stream gives any more."""
        self._widened.pop(number, None)
        outgoing = self._waiting.pop(number, None)
        if outgoing is not None and outgoing.on_sent is not None:
            outgoing.on_sent()

    def waits(self, number: int) -> bool:
        """Whether data of a stream has still to go."""
        return number in self._waiting

    def lost(self) -> None:
        """The peer is gone."""
        for number in list(self._widened):
            self.forget(number)

    # -- the transport

    def write(self, data: bytes) -> None:
        """A whole frame, or several: sent with what else is sent in this turn of the loop."""
        self._out.append(data)
        if not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Sends what was written."""
        self._will_flush = False
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            if not self._transport.is_closing():
                self._transport.write(data)

    def acknowledge(self, data: bytes) -> None:
        """What the peer has asked for. Raises ConnectionBroken when it asks on and on, and reads nothing."""
        self.write(data)
        self._unread += self._is_paused
        if self._unread > _UNREAD:
            raise ConnectionBroken(Reason.ENHANCE_YOUR_CALM, f"{_UNREAD} acknowledgements were asked for and not read")

    def pause(self) -> None:
        """The peer reads too slowly."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._unread = 0
        self._pump()

    # -- the peer's windows

    def settle(self, settings: Mapping[int, int]) -> None:
        """The peer's settings, by number. Raises ConnectionBroken for values that are none."""
        window, frame = settings.get(frames.WINDOW_SIZE), settings.get(frames.FRAME_SIZE)
        if window is not None:
            if window > LARGEST_WINDOW:
                raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"a window of {window}")
            self._stream_window = window
        if frame is not None:
            if not DEFAULT_FRAME <= frame <= frames.LARGEST_FRAME:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"frames of {frame}")
            self._frame = frame
        self._pump()

    def widen(self, number: int, size: int) -> None:
        """The peer takes `size` bytes more; on stream 0, of all streams together. Raises ConnectionBroken."""
        if not number:
            self._window += size
            if self._window > LARGEST_WINDOW:
                raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, "the connection's window is too large")
        elif number in self._widened:
            self._widened[number] += size
            if self._room(number) > LARGEST_WINDOW:
                self.reset(number, Reason.FLOW_CONTROL_ERROR)
        self._pump()

    def _room(self, number: int) -> int:
        return self._stream_window + self._widened[number]

    # -- what goes

    def answer(self, number: int, body: bytes) -> None:
        """A whole answer: headers, `body`, status OK."""
        if number not in self._widened:
            return
        size, opening = len(body), frames.opening
        head = opening(HEADERS, END_HEADERS, number, len(_ANSWER)) + _ANSWER
        tail = opening(HEADERS, _LAST, number, len(_END)) + _END
        if size <= self._frame and size <= self._window and size <= self._room(number):
            self._window -= size
            self.write(head + opening(DATA, 0, number, size))
            self._out += (body, tail)
            self._end(number)
            return
        self.write(head)
        self._send(number, body, tail, None)

    def request(self, number: int, block: bytes, body: bytes) -> None:
        """A whole request: headers, and a body that ends our side."""
        size = len(body)
        self.headers(number, block)
        if size <= self._frame and size <= self._window and size <= self._room(number):
            self._window -= size
            self._out += (frames.opening(DATA, END_STREAM, number, size), body)
            self._end(number)
            return
        self._send(number, body, frames.opening(DATA, END_STREAM, number, 0), None)

    def headers(self, number: int, block: bytes) -> None:
        """The headers of a request or an answer."""
        if number not in self._widened:
            return
        if len(block) <= DEFAULT_FRAME:
            self.write(frames.opening(HEADERS, END_HEADERS, number, len(block)) + block)
            return
        pieces = [block[at : at + DEFAULT_FRAME] for at in range(0, len(block), DEFAULT_FRAME)]
        for at, piece in enumerate(pieces):
            kind, flags = CONTINUATION if at else HEADERS, END_HEADERS if piece is pieces[-1] else 0
            self.write(frames.frame(kind, flags, number, piece))

    def data(self, number: int, data: bytes, on_sent: Callable[[], None]) -> None:
        """Data of an answer, as windows allow. `on_sent` is called once all of it has gone, or nobody wants it."""
        if number in self._widened:
            self._send(number, data, b"", on_sent)
        else:
            on_sent()

    def end(self, number: int, block: bytes) -> None:
        """Ends an answer with these headers (of which there were none) or trailers, once its data has gone."""
        self._finish(number, frames.opening(HEADERS, _LAST, number, len(block)) + block)

    def end_data(self, number: int) -> None:
        """Ends an answer that has no trailers, as plain HTTP does."""
        self._finish(number, frames.opening(DATA, END_STREAM, number, 0))

    def reset(self, number: int, reason: Reason) -> None:
        """Ends a stream without a status."""
        if number in self._widened:
            self.forget(number)
            self.write(frames.rst_stream(number, reason))
            self._ended(number, reason)

    def _finish(self, number: int, last: bytes) -> None:
        if number in self._waiting:
            self._send(number, b"", last, None)
        elif number in self._widened:
            self.write(last)
            self._end(number)

    def _end(self, number: int) -> None:
        del self._widened[number]
        self._ended(number, None)

    def _send(self, number: int, data: bytes, after: bytes, on_sent: Callable[[], None] | None) -> None:
        outgoing = self._waiting.setdefault(number, Outgoing())
        if data:
            outgoing.chunks.append(memoryview(data))
        outgoing.after += after
        outgoing.on_sent = on_sent or outgoing.on_sent
        self._pump()

    def _pump(self) -> None:
        """Sends of what waits as much as the windows allow."""
        for number in list(self._waiting):
            if self._window <= 0 or self._is_paused:
                return
            outgoing = self._waiting[number]
            while outgoing.chunks and self._window > 0:
                chunk = outgoing.chunks[0]
                size = min(self._frame, self._window, self._room(number), len(chunk))
                if size <= 0:
                    break
                self.write(frames.opening(DATA, 0, number, size) + bytes(chunk[:size]))
                self._window -= size
                self._widened[number] -= size
                if size == len(chunk):
                    outgoing.chunks.popleft()
                else:
                    outgoing.chunks[0] = chunk[size:]
            if not outgoing.chunks:
                del self._waiting[number]
                if outgoing.after:
                    self.write(outgoing.after)
                    self._end(number)
                if outgoing.on_sent is not None:
                    outgoing.on_sent()
