"""A client that sends what no gRPC client would: its own HTTP/2 headers, bodies and bytes, and says what came back."""

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
    """One gRPC message; `size` says a lie about its length."""
    return bytes([flags]) + (len(message) if size is None else size).to_bytes(4, "big") + message


class Silence(AssertionError):
    """Nothing came, neither an answer nor an end."""


@dataclass
class Answer:
    """What came back for one call."""

    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    """The error code of RST_STREAM."""
    is_cut: bool = False
    """The connection ended first."""

    @property
    def http_status(self) -> int | None:
        return int(self.headers[":status"]) if ":status" in self.headers else None

    @property
    def status(self) -> int | None:
        """The gRPC status; None when there is none."""
        said = self.trailers.get("grpc-status", self.headers.get("grpc-status"))
        return None if said is None else int(said)

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

    def open(self, path: str = INFER, change: Mapping[str, str | bytes | None] = {}, more: Headers = ()) -> int:
        """Starts a call with gRPC's headers, some of them changed or (None) left out, and `more` of them."""
        headers: dict[str, str | bytes | None] = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "shoal",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        headers.update(change)
        sent = [(key.encode(), _bytes(value)) for key, value in headers.items() if value is not None]
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, [*sent, *more])
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Sends a piece of the body, as fast as the other end takes it."""
        try:
            while data and stream not in self.ended and not self.is_closed:
                room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size, len(data))
                if room:
                    self.h2.send_data(stream, data[:room])
                    data = data[room:]
                    self.flush()
                else:
                    self._take()
            if end and stream not in self.ended and not self.is_closed:
                self.h2.end_stream(stream)
                self.flush()
        except (h2.exceptions.ProtocolError, OSError):
            pass  # It has been answered, or cut: `answer` says which.

    def answer(self, stream: int) -> Answer:
        """What came for a call, once that is over. Fails when nothing comes."""
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
        """A whole call; a body in pieces goes out in so many frames at least."""
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
    """A connection to `host:port` or `unix:/path`."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(patience_s)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), patience_s)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def raw(address: str, data: bytes) -> bytes:
    """Sends bytes as they are and no more, on a connection of their own; returns what comes until the other end closes.

    Fails when it neither closes nor says anything more.
    """
    with connected(address) as sock:
        got = b""
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                got += piece
        except TimeoutError as err:
            raise Silence("it keeps a connection that was half closed") from err
        except OSError:
            pass  # It cut the connection, which is an answer too.
        return got


def _bytes(value: str | bytes) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else value
