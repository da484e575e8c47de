"""Client connections of bystanders and attackers: frames of HTTP/2 by hand, without a limit of their own.

A script is a generator that yields bytes to send, or None to continue after the next data from the server, 10 ms later
at most. Several scripts take turns on one connection.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping

from mesh.h2 import frames
from mesh.h2.frames import END_HEADERS, END_STREAM, Reason
from mesh.h2.headers import Decoder, Fields, HeaderCache, encode

Script = Generator[bytes | None, None, None]

INFER = b"/inference.GRPCInferenceService/ModelInfer"
LIVE = b"/inference.GRPCInferenceService/ServerLive"
HEALTH = b"/grpc.health.v1.Health/Check"
SUBMIT = b"/shoal.ingest.v1.IngestService/Submit"
RESULT = b"/shoal.store.v1.StoreService/GetResult"
PREFIX_BYTES = 5
"""Bytes before a gRPC message."""

# Data is sent in pieces of this size, so that a script does not run far ahead of its socket.
_PIECE = 256 << 10
# The server's DATA is credited in steps.
_CREDIT = 1 << 24
_CACHE = HeaderCache()


def framed(message: bytes, *, is_compressed: bool = False) -> bytes:
    """Return a gRPC message with its prefix."""
    return struct.pack(">BI", is_compressed, len(message)) + message


def head(path: bytes = INFER, *more: tuple[bytes, bytes], tenant: str) -> bytes:
    """Encode the headers of a request, as literals."""
    fields: Fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"x-shoal-tenant", tenant.encode()),
        *more,
    ]
    return encode(fields)


class Connection:
    """One connection, whose socket never blocks.

    `tally` counts frames that were sent by a script's own account, and what came back: statuses, resets, ends.
    `on_end(stream, outcome, body)` is called at the end of each call; outcomes are "status N MESSAGE", "reset REASON".
    """

    def __init__(
        self,
        address: str,
        tally: Counter[str],
        *,
        settings: Mapping[int, int] = {},
        is_plain: bool = False,
        on_end: Callable[[int, str, bytes], None] | None = None,
    ) -> None:
        self.tally = tally
        self._on_end = on_end
        self.socket = _connecting(address)
        self._is_plain = is_plain
        self.responses = 0
        """Responses over HTTP/1.1."""
        self.scripts: list[Script] = []
        self.is_open = True
        self.is_reading = True
        """Set to False by scripts of clients that do not read."""
        self.is_greeted = False
        """The server's SETTINGS have arrived."""
        self.is_parked = False
        self.goaway: int | None = None
        """The last stream that the server serves, after its GOAWAY."""
        self.max_streams = 1 << 31
        self.streams: set[int] = set()
        """Calls without a response yet."""
        self._decoder = Decoder(_CACHE)
        self._number = 1
        self._window = self._initial_window = frames.DEFAULT_WINDOW
        self._windows: dict[int, int] = {}
        self._uncredited = 0
        self._bodies: dict[int, bytearray] = {}
        self._unparsed = b""
        ours = {
            frames.TABLE_SIZE: 0,
            frames.ENABLE_PUSH: 0,
            frames.WINDOW_SIZE: frames.LARGEST_WINDOW,
            **settings,
        }
        window = frames.window_update(0, frames.LARGEST_WINDOW - frames.DEFAULT_WINDOW)
        self._out = bytearray(b"" if is_plain else frames.PREFACE + frames.settings(ours) + window)

    # -- for scripts

    def open(self, block: bytes, *, is_whole: bool = False) -> tuple[int, bytes]:
        """Return a new stream, and the frames that open it."""
        number, self._number = self._number, self._number + 2
        self.streams.add(number)
        self._windows[number] = self._initial_window
        return number, headers(number, block, END_STREAM if is_whole else 0)

    def call(self, block: bytes, body: bytes) -> Script:
        """Send a whole call, as fast as flow control allows."""
        number, opening = self.open(block)
        yield opening
        yield from self.body(number, body)

    def body(self, number: int, data: bytes, *, is_end: bool = True, is_patient: bool = True) -> Script:
        """Send DATA. Return early when the call ends; also when its window closes, unless the script is patient."""
        at = 0
        while at < len(data) and number in self.streams:
            room = min(self._window, self._windows[number], _PIECE)
            if room <= 0:
                if not is_patient:
                    return
                yield None
                continue
            piece = memoryview(data)[at : at + room]
            at += len(piece)
            self._window -= len(piece)
            self._windows[number] -= len(piece)
            yield dataframes(number, piece, END_STREAM if is_end and at >= len(data) else 0)

    def take(self, number: int, size: int) -> bool:
        """Take `size` bytes of the windows. Return False when a window has less."""
        if size > min(self._window, self._windows.get(number, 0)):
            return False
        self._window -= size
        self._windows[number] -= size
        return True

    def fewer(self, calls: int) -> Script:
        """Wait until fewer calls than this are without a response."""
        while len(self.streams) >= min(calls, self.max_streams):
            yield None

    def read_now_and_then(self, pause_s: float | None) -> Script:
        """Read for a moment after each pause, for ever; None: never."""
        self.is_reading = False
        while True:
            due = math.inf if pause_s is None else time.monotonic() + pause_s
            while time.monotonic() < due:
                yield None
            self.is_reading = True
            yield None
            self.is_reading = False

    def forget(self, number: int) -> None:
        """Expect no response: the script has reset the stream."""
        self.streams.discard(number)
        self._windows.pop(number, None)

    # -- for the loop

    def send(self, data: bytes) -> None:
        self._out += data

    @property
    def has_output(self) -> bool:
        return bool(self._out) or (self.is_greeted and bool(self.scripts) and not self.is_parked)

    def write(self) -> None:
        """Send the pending data, then the next data of each script."""
        if not self._flush() or not self.is_greeted:
            return
        is_idle = True
        for script in tuple(self.scripts):
            try:
                data = next(script)
            except StopIteration:
                self.scripts.remove(script)
                continue
            if data is not None:
                is_idle = False
                self._out += data
        self.is_parked = is_idle
        if self._out:
            self._flush()

    def _flush(self) -> bool:
        """Return True when all is sent."""
        try:
            while self._out:
                with memoryview(self._out) as view:
                    sent = self.socket.send(view[:_PIECE])
                del self._out[:sent]
        except BlockingIOError:
            return False
        except OSError as err:
            self._close(type(err).__name__)
            return False
        return True

    def read(self) -> None:
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as err:
            self._close(type(err).__name__)
            return
        if not data:
            self._close("closed")
            return
        self.is_parked = False
        if self._is_plain:
            # A head that is cut is missed: scripts that wait for a response send one request at a time.
            self.responses += data.count(b"HTTP/1.1 ")
            self.tally[f"http {data[9:12].decode('latin-1')}" if data.startswith(b"HTTP/1.1 ") else "data"] += 1
            return
        data = self._unparsed + data
        at, end = 0, len(data)
        while end - at >= frames.HEADER_BYTES:
            high, low, kind, flags, number = frames.HEADER.unpack_from(data, at)
            stop = at + frames.HEADER_BYTES + (high << 16 | low)
            if stop > end:
                break
            self._on_frame(kind, flags, number, data[at + frames.HEADER_BYTES : stop])
            at = stop
        self._unparsed = data[at:]

    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == frames.DATA:
            self._uncredited += len(payload)
            if self._uncredited >= _CREDIT:
                self._out += frames.window_update(0, self._uncredited)
                self._uncredited = 0
            if self._on_end is not None:
                self._bodies.setdefault(number, bytearray()).extend(payload)
        elif kind == frames.HEADERS:
            block = self._decoder.decode(payload)
            if flags & END_STREAM:
                code = block.by_name.get(b"grpc-status", b"http " + block.by_name.get(b":status", b"?"))
                self._end(number, f"status {code.decode()}", block.by_name.get(b"grpc-message", b"").decode())
        elif kind == frames.RST_STREAM:
            self._end(number, f"reset {_reason(struct.unpack('>I', payload)[0])}")
        elif kind == frames.WINDOW_UPDATE:
            size = struct.unpack(">I", payload)[0]
            if not number:
                self._window += size
            elif number in self._windows:
                self._windows[number] += size
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            self._on_settings(dict(struct.iter_unpack(">HI", payload)))
        elif kind == frames.SETTINGS:
            self._decoder.forbid_table()
        elif kind == frames.PING and not flags & frames.ACK:
            self._out += frames.frame(frames.PING, frames.ACK, 0, payload)
        elif kind == frames.GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            self.goaway = last
            self.tally[f"goaway {_reason(code)}"] += 1

    def _on_settings(self, theirs: dict[int, int]) -> None:
        change = theirs.get(frames.WINDOW_SIZE, self._initial_window) - self._initial_window
        self._initial_window += change
        self._windows = {number: window + change for number, window in self._windows.items()}
        self.max_streams = theirs.get(frames.MAX_STREAMS, self.max_streams)
        self._out += frames.frame(frames.SETTINGS, frames.ACK, 0)
        self.is_greeted = True

    def _end(self, number: int, outcome: str, message: str = "") -> None:
        body = bytes(self._bodies.pop(number, b""))
        if number in self.streams:
            self.forget(number)
            self.tally[outcome] += 1
            if self._on_end is not None:
                self._on_end(number, f"{outcome} {message}".rstrip(), body)

    def _close(self, why: str) -> None:
        self.tally[f"connection {why}"] += 1
        self.close()

    def close(self) -> None:
        """Close the socket. Calls without a response stay in `streams`."""
        self.is_open = False
        self.socket.close()


def headers(number: int, block: bytes, flags: int = 0) -> bytes:
    """Return HEADERS, with CONTINUATION where the block is long."""
    pieces = [block[at : at + frames.DEFAULT_FRAME] for at in range(0, len(block), frames.DEFAULT_FRAME)]
    last = len(pieces) - 1
    return b"".join(
        frames.frame(
            frames.CONTINUATION if n else frames.HEADERS,
            (0 if n else flags) | (END_HEADERS if n == last else 0),
            number,
            piece,
        )
        for n, piece in enumerate(pieces)
    )


def dataframes(number: int, data: bytes | memoryview, flags: int = 0) -> bytes:
    """Return DATA of the default size; `flags` are those of the last frame."""
    parts: list[bytes | memoryview] = []
    for at in range(0, len(data), frames.DEFAULT_FRAME):
        piece = data[at : at + frames.DEFAULT_FRAME]
        is_last = at + len(piece) >= len(data)
        parts += [frames.opening(frames.DATA, flags if is_last else 0, number, len(piece)), piece]
    return b"".join(parts)


def _reason(code: int) -> str:
    try:
        return Reason(code).name
    except ValueError:
        return str(code)


def _connecting(address: str) -> socket.socket:
    """Return a socket that connects to `host:port` or `unix:PATH`."""
    place: str | tuple[str, int]
    if address.startswith("unix:"):
        made, place = socket.socket(socket.AF_UNIX), address.removeprefix("unix:")
    else:
        host, _, port = address.rpartition(":")
        made, place = socket.socket(), (host, int(port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setblocking(False)
    made.connect_ex(place)
    return made


def pin_to_client_core(*, has_precedence: bool) -> None:
    """Pin this process to processor 1 if the machine has one.

    A process with precedence runs before the attacker, who gets what is left: its waits are the server's. That takes
    root, or CAP_SYS_NICE.
    """
    if 1 in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {1})
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), 0))
    if has_precedence:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -15)
