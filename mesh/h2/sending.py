"""Outgoing half of a connection: frames are collected and written together, and data keeps to the peer's windows.

    respond, request ──fits──> out ──once an iteration of the loop──> transport
           └──does not──> waiting, by stream ──window──> ready ──a frame of each in turn──> out

The room of a stream is the initial window of the peer's settings plus the stream's own change since it was opened.
Waiting bytes are counted in the memory for responses.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping

from mesh.h2 import frames
from mesh.h2.bursts import Bursts
from mesh.h2.frames import (
    CONTINUATION,
    DATA,
    DEFAULT_FRAME,
    DEFAULT_TABLE,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    LARGEST_WINDOW,
    ConnectionBroken,
    Reason,
)
from mesh.h2.headers import TABLE_UPDATE
from mesh.h2.memory_account import ClientShare, Share

log = logging.getLogger(__name__)

# Acknowledgements of PING and SETTINGS that a peer may leave unread: each of them costs memory.
_MAX_UNREAD = 1000

# A response of so many bytes finds room beside large ones of its tenant, or of its connection. Mostly it waits for its
# turn only: a stream of Envoy has a window for it.
_SMALL_RESPONSE = 64 << 10

_LAST = END_HEADERS | END_STREAM

PROGRESS_BYTES = 1024
"""Less than this in a tick is no progress: a body that trickles, in either direction, would hold its memory, and the
places of its call, as long as the client likes."""

# Waiting data that is written in one iteration of the event loop: 1 MiB costs 0.3 ms. The transport may then pause: all
# that it has left is written in one iteration, of each connection whose peer reads again. So a peer that makes it pause
# gets little at a time, and twice as much after each time that it does not.
_FIRST_BURST, _LEAST_BURST, _BURST_BYTES = 256 << 10, 64 << 10, 1 << 20

# Each waiting stream that is looked at counts at least as many of them: 64 streams an iteration. A peer may change the
# windows of 4,096 streams at once, and a frame of one byte costs 3 us.
_STREAM_BYTES = 16 << 10

# Frames of waiting data. Streams take turns by frame, so a peer that allows frames of 16 MiB gets smaller ones.
_TURN_BYTES = 64 << 10


class Outgoing:
    """Data of one stream that waits for a window; then its end, if any."""

    __slots__ = ("chunks", "end", "idle_ticks", "is_ready", "moved", "on_sent", "share", "size")

    share: Share | ClientShare
    """Share of the memory in which `size` is counted. It is set with the first data: one that holds nothing may have
    been dropped."""

    def __init__(self) -> None:
        self.chunks: deque[memoryview] = deque()
        self.size = 0
        """Bytes of the chunks."""
        self.end: bytes | None = None
        """Trailers, or nothing, that end the stream. None: the stream goes on."""
        self.on_sent: Callable[[], None] | None = None
        self.is_ready = False
        """True: the stream is in the queue of the ready ones."""
        self.idle_ticks = self.moved = 0
        """Ticks in which the peer took less than PROGRESS_BYTES, and what it took in this one."""

    def report_sent(self) -> None:
        """Call `on_sent`. An exception in it must not harm other streams."""
        if self.on_sent is None:
            return
        try:
            self.on_sent()
        except Exception:
            log.exception("a callback of a stream's sender failed", {"event": "stream.callback_failed"})


class Sender:
    """Sends to one peer. Calls for a stream that is not open send nothing, except that `request` needs an open stream.

    Args:
        ended: called for each stream whose sending side has ended; with a reason when it was reset.
        share_of: returns the share of the memory for data that waits, by stream.
        bursts: turns that connections share for such data; None: the connection has its own.
    """

    def __init__(
        self,
        ended: Callable[[int, Reason | None], None],
        share_of: Callable[[int], Share | ClientShare],
        bursts: Bursts | None = None,
    ) -> None:
        self._ended = ended
        self._share_of = share_of
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._will_flush = False
        self._window_changes: dict[int, int] = {}
        self._waiting: dict[int, Outgoing] = {}
        self._ready: deque[int] = deque()
        self._pumped, self._burst = 0, _FIRST_BURST
        self._bursts = Bursts() if bursts is None else bursts
        self._waits_for_turn = False
        # A whole response may be written at once: nothing is paused, and no table size update is due.
        self._is_direct = True
        self._owes_update = self._has_updated = False
        self._window = self._initial_window = frames.DEFAULT_WINDOW
        self._frame = DEFAULT_FRAME
        self._is_paused = self._is_eof_written = False
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
            if outgoing.size:
                outgoing.share.remove(outgoing.size)
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
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write everything that was added, in one piece."""
        self._will_flush = False
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            if not self._is_eof_written and not self._transport.is_closing():
                self._transport.write(data)
        if self._pumped >= self._burst and not self._is_paused:
            self._burst = min(2 * self._burst, _BURST_BYTES)
        self._pumped = 0

    def write_eof(self) -> None:
        """Close our side, after everything that was added. What is added later is dropped."""
        self._is_eof_written = True
        self._transport.write_eof()

    def acknowledge(self, data: bytes) -> None:
        """Write an acknowledgement. Raises ConnectionBroken for a peer that asks for many and reads none."""
        self.write(data)
        self._unread += self._is_paused
        if self._unread > _MAX_UNREAD:
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM, f"{_MAX_UNREAD} acknowledgements were requested and not read"
            )

    def pause(self) -> None:
        """Hold back data: the transport's buffer is full. Headers and acknowledgements are written nevertheless."""
        self._is_paused = True
        self._is_direct = False
        self._burst = _LEAST_BURST

    def resume(self) -> None:
        """Send waiting data again."""
        self._is_paused = False
        self._is_direct = not self._owes_update
        self._unread = 0
        self._pump()

    # -- the peer's windows

    def apply_settings(self, settings: Mapping[int, int]) -> None:
        """Apply the peer's settings, by number. Raises ConnectionBroken for invalid values."""
        window, frame = settings.get(frames.WINDOW_SIZE), settings.get(frames.FRAME_SIZE)
        if settings.get(frames.TABLE_SIZE, DEFAULT_TABLE) < DEFAULT_TABLE and not self._has_updated:
            self._owes_update = self._has_updated = True
            self._is_direct = False
        if frame is not None:
            if not DEFAULT_FRAME <= frame <= frames.LARGEST_FRAME:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"frames of {frame}")
            self._frame = frame
        if window is not None and window != self._initial_window:
            if window + max(self._window_changes.values(), default=0) > LARGEST_WINDOW or window > LARGEST_WINDOW:
                raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"a window of {window}")
            self._initial_window = window
            for number, outgoing in self._waiting.items():
                self._wake(number, outgoing)
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
            outgoing = self._waiting.get(number)
            if outgoing is None:
                return
            self._wake(number, outgoing)
        if self._ready:
            self._pump()

    def _room(self, number: int) -> int:
        return self._initial_window + self._window_changes[number]

    # -- requests and responses

    def has_room(self, number: int, size: int) -> bool:
        """Return True when a response of `size` bytes can be sent now, or may wait for the peer to read."""
        if number not in self._window_changes:
            return True
        if self._is_direct and size <= self._window and size <= self._room(number):
            return True
        share = self._share_of(number)
        return share.has_room(size) or (size <= _SMALL_RESPONSE and share.has_room_beside_large(size))

    def respond(self, number: int, head: bytes, body: bytes, trailers: bytes) -> None:
        """Send a whole response: its head, its body if any, its trailers if any.

        The stream is reset instead when its share of the memory holds too many bytes that wait.
        """
        if number not in self._window_changes:
            return
        size, opening = len(body), frames.opening
        fits = self._is_direct and size <= self._frame and size <= self._window and size <= self._room(number)
        if trailers and fits and len(head) + len(trailers) <= DEFAULT_FRAME:
            # The common case: no function calls but these.
            self._window -= size
            self.write(opening(HEADERS, END_HEADERS, number, len(head)) + head + opening(DATA, 0, number, size))
            self._out += (body, opening(HEADERS, _LAST, number, len(trailers)) + trailers)
            self._end(number)
            return
        if not size and not trailers:
            self.write(self._header_frames(number, head, is_last=True))
            self._end(number)
            return
        if not self.has_room(number, size):
            self.reset(number, Reason.ENHANCE_YOUR_CALM)
            return
        self.write(self._header_frames(number, head))
        if size:
            self._send(number, body, trailers, None)
        else:
            self.end(number, trailers)

    def request(self, number: int, head: bytes, body: bytes) -> None:
        """Send a whole request on an open stream: its head, and a body that ends our side.

        Raises KeyError for a stream that is not open.
        """
        size = len(body)
        self.headers(number, head)
        if self._is_direct and size <= self._frame and size <= self._window and size <= self._room(number):
            self._window -= size
            self._out += (frames.opening(DATA, END_STREAM, number, size), body)
            self._end(number)
            return
        self._send(number, body, b"", None)

    def headers(self, number: int, head: bytes) -> None:
        """Send the head of a request or a response whose data follows."""
        if number in self._window_changes:
            self.write(self._header_frames(number, head))

    def data(self, number: int, data: bytes | memoryview, on_sent: Callable[[], None] | None = None) -> None:
        """Send data as windows allow. `on_sent` is called when all of it is written, or the stream is closed."""
        if number in self._window_changes:
            self._send(number, data, None, on_sent)
        elif on_sent is not None:
            on_sent()

    def end(self, number: int, trailers: bytes = b"") -> None:
        """End a stream, after its data: with trailers, if any."""
        if number in self._waiting:
            self._send(number, b"", trailers, None)
        elif number in self._window_changes:
            self.write(self._end_frames(number, trailers))
            self._end(number)

    def reset(self, number: int, reason: Reason) -> None:
        """End a stream with RST_STREAM."""
        if number in self._window_changes:
            self.forget(number)
            self.write(frames.rst_stream(number, reason))
            self._ended(number, reason)

    def _end(self, number: int) -> None:
        del self._window_changes[number]
        self._ended(number, None)

    def _send(
        self, number: int, data: bytes | memoryview, end: bytes | None, on_sent: Callable[[], None] | None
    ) -> None:
        outgoing = self._waiting.get(number)
        if outgoing is None:
            outgoing = self._waiting[number] = Outgoing()
        if data:
            if not outgoing.size:
                outgoing.share = self._share_of(number)
            outgoing.chunks.append(memoryview(data))
            outgoing.size += len(data)
            outgoing.share.add(len(data))
        outgoing.end = end
        outgoing.on_sent = on_sent or outgoing.on_sent
        self._wake(number, outgoing)
        self._pump()

    def _wake(self, number: int, outgoing: Outgoing) -> None:
        if not outgoing.is_ready:
            outgoing.is_ready = True
            self._ready.append(number)

    def _pump(self) -> None:
        """Send waiting data as the windows allow, one frame of each ready stream in turn."""
        ready, begun_at = self._ready, self._pumped
        most = min(self._burst, begun_at + self._bursts.left)
        while ready and self._window > 0 and not self._is_paused and self._pumped < most:
            number = ready.popleft()
            self._pumped += _STREAM_BYTES
            # The stream may have been dropped meanwhile.
            if (outgoing := self._waiting.get(number)) is None:
                continue
            if outgoing.chunks:
                chunk = outgoing.chunks[0]
                size = min(self._frame, _TURN_BYTES, self._window, self._room(number), len(chunk))
                if size <= 0:
                    outgoing.is_ready = False
                    continue
                self.write(frames.opening(DATA, 0, number, size) + bytes(chunk[:size]))
                self._window -= size
                self._window_changes[number] -= size
                self._pumped += max(size - _STREAM_BYTES, 0)
                outgoing.size -= size
                outgoing.moved += size
                outgoing.share.remove(size)
                if size == len(chunk):
                    outgoing.chunks.popleft()
                else:
                    outgoing.chunks[0] = chunk[size:]
                if outgoing.chunks:
                    ready.append(number)
                    continue
            del self._waiting[number]
            if outgoing.end is not None:
                self.write(self._end_frames(number, outgoing.end))
                self._end(number)
            outgoing.report_sent()
        if self._pumped > begun_at:
            self._bursts.take(self._pumped - begun_at)
            # A flush begins to count `_pumped` anew: it is due also when nothing was written.
            self._flush_soon()
        if self._pumped >= most and ready and not self._waits_for_turn:
            self._waits_for_turn = True
            self._bursts.wait(self._take_turn)

    def _take_turn(self) -> None:
        self._waits_for_turn = False
        self._pump()

    def tick(self, max_ticks: int) -> None:
        """Reset the streams of which the peer has taken nearly nothing for more than `max_ticks` ticks."""
        is_open = self._window > 0
        for number, outgoing in list(self._waiting.items()):
            # A ready stream waits for its turn, or for the transport.
            if outgoing.is_ready and is_open:
                continue
            outgoing.idle_ticks = 0 if outgoing.moved >= PROGRESS_BYTES else outgoing.idle_ticks + 1
            outgoing.moved = 0
            if outgoing.idle_ticks > max_ticks:
                log.info(
                    "stream %(stream)d is reset: its peer takes none of the %(bytes)d bytes that wait",
                    {"event": "stream.reset_unread", "stream": number, "bytes": outgoing.size},
                )
                self.reset(number, Reason.CANCEL)

    def _header_frames(self, number: int, block: bytes, *, is_last: bool = False) -> bytes:
        """Encode a header block. The first one after a peer has lowered its table size begins with an update."""
        if self._owes_update:
            self._owes_update = False
            self._is_direct = not self._is_paused
            block = TABLE_UPDATE + block
        return _header_frames(number, block, is_last=is_last)

    def _end_frames(self, number: int, trailers: bytes) -> bytes:
        if trailers:
            return self._header_frames(number, trailers, is_last=True)
        return frames.opening(DATA, END_STREAM, number, 0)


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
