"""HTTP/2 client for requests that no gRPC client sends: arbitrary headers, bodies and bytes."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
PATIENCE_S = 30.0

Headers = Sequence[tuple[bytes, bytes]]


def framed(message: bytes, flags: int = 0, size: int | None = None) -> bytes:
    """Return one gRPC message; `size` replaces its length in the prefix."""
    return bytes([flags]) + (len(message) if size is None else size).to_bytes(4, "big") + message


class Silence(AssertionError):
    """Neither a response nor the end of the connection arrived in time."""


@dataclass
class Answer:
    """Response to one call."""

    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    """The error code of RST_STREAM."""
    is_cut: bool = False
    """True when the connection ended first."""

    @property
    def http_status(self) -> int | None:
        return int(self.headers[":status"]) if ":status" in self.headers else None

    @property
    def status(self) -> int | None:
        """The gRPC status; None without one."""
        status = self.trailers.get("grpc-status", self.headers.get("grpc-status"))
        return None if status is None else int(status)

    @property
    def message(self) -> str:
        return self.trailers.get("grpc-message", self.headers.get("grpc-message", ""))

    @property
    def messages(self) -> list[bytes]:
        """The messages of the body."""
        found, at = [], 0
        while at < len(self.data):
            size = int.from_bytes(self.data[at + 1 : at + 5], "big")
            found.append(self.data[at + 5 : at + 5 + size])
            at += 5 + size
        return found


class Connection:
    """One HTTP/2 connection without TLS. Use as `with`."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.socket = connected(address, patience_s)
        self._patience_s = patience_s
        config = h2.config.H2Configuration(
            header_encoding="latin-1",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()
        self.answers: dict[int, Answer] = {}
        self.ended: set[int] = set()
        self.is_closed = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def open(
        self,
        path: str = INFER,
        change: Mapping[str, str | bytes | None] = {},
        more: Headers = (),
        *,
        has_body: bool = True,
    ) -> int:
        """Start a call with gRPC's headers, with `change` applied (None removes a header), and `more` headers.

        Without a body, the call ends with its headers.
        """
        headers: dict[str, str | bytes | None] = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        headers.update(change)
        sent = [(key.encode(), _bytes(value)) for key, value in headers.items() if value is not None]
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, [*sent, *more], end_stream=not has_body)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send a piece of the body, as fast as flow control allows."""
        try:
            while data and stream not in self.ended and not self.is_closed:
                size = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size, len(data))
                if size:
                    self.h2.send_data(stream, data[:size])
                    data = data[size:]
                    self.flush()
                else:
                    self._take()
            if end and stream not in self.ended and not self.is_closed:
                self.h2.end_stream(stream)
                self.flush()
        # The call has been answered, or the connection closed: `answer` returns which.
        except (h2.exceptions.ProtocolError, OSError):
            pass

    def answer(self, stream: int) -> Answer:
        """Wait for the end of a call, and return its response. Raises Silence when nothing arrives."""
        while stream not in self.ended and not self.is_closed:
            self._take()
        self.answers[stream].is_cut = stream not in self.ended
        return self.answers[stream]

    def call(
        self,
        body: bytes | Iterable[bytes] = b"",
        path: str = INFER,
        change: Mapping[str, str | bytes | None] = {},
        more: Headers = (),
    ) -> Answer:
        """Make a whole call. Each piece of a body in pieces is sent in a frame of its own, at least."""
        stream = self.open(path, change, more)
        for piece in [body] if isinstance(body, bytes) else body:
            self.send(stream, piece)
        self.send(stream, b"", end=True)
        return self.answer(stream)

    def reset(self, stream: int) -> None:
        self.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self.flush()
        self.ended.add(stream)

    def _take(self) -> None:
        try:
            data = self.socket.recv(1 << 20)
            events = self.h2.receive_data(data) if data else []
            self.flush()
        except (OSError, h2.exceptions.ProtocolError) as err:
            if isinstance(err, TimeoutError):
                raise Silence(f"no answer within {self._patience_s:.0f} s") from err
            self.is_closed = True
            return
        self.is_closed = not data
        for event in events:
            self._note(event)

    def _note(self, event: h2.events.Event) -> None:
        stream = getattr(event, "stream_id", None)
        answer = self.answers.get(stream) if stream else None
        if isinstance(event, h2.events.ConnectionTerminated):
            self.is_closed = True
        if answer is None or stream is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            answer.headers.update(event.headers)
        elif isinstance(event, h2.events.TrailersReceived):
            answer.trailers.update(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            answer.data += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
            self.flush()
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = int(event.error_code)
            self.ended.add(stream)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(stream)


def connected(address: str, patience_s: float = PATIENCE_S) -> socket.socket:
    """Return a socket connected to `host:port` or `unix:/path`."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(patience_s)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), patience_s)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def raw(address: str, data: bytes, *, half_closes: bool = True) -> bytes:
    """Send bytes on a new connection, and return the bytes received until the server closes it.

    With `half_closes`, the client ends its side first: it wants no response of HTTP/1.1.

    Raises:
        Silence: the server neither closes the connection nor sends anything more.
    """
    with connected(address) as sock:
        got = b""
        try:
            sock.sendall(data)
            if half_closes:
                sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                got += piece
        except TimeoutError as err:
            raise Silence("the server keeps the connection open") from err
        # A reset of the connection is an end, too.
        except OSError:
            pass
        return got


def _bytes(value: str | bytes) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else value
