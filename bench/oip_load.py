"""Load generator for ModelInfer with a cost of a few microseconds per request, so that the server is the bottleneck.

Requests are encoded once, and each response is compared with the expected answer of its request. One thread, one
process.

    closed loop   a constant number of requests in flight (`in_flight`)
    open loop     a constant rate of requests (`rate`), independent of the server, each with a deadline
"""

from __future__ import annotations

import asyncio
import math
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesh.h2 import frames
from mesh.h2.headers import Decoder, HeaderCache, encode
from shoal.inference.v2 import inference_pb2 as oip
from shoal.tenant_header import TENANT_HEADER

_PATH = "/inference.GRPCInferenceService/ModelInfer"
_TOLERANCE = 1e-3
_MOST_RIGHT = 10_000
# Up to 8 requests in flight use one connection, more use eight.
_ON_ONE = 8
_CONNECTIONS = 8

DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 4, 8, 14


@dataclass
class Count:
    """Counts of the responses to one load."""

    seconds: float = 0.0
    good: int = 0
    wrong: int = 0
    """Responses that do not match their request."""
    late: int = 0
    """Correct responses after the deadline."""
    by_status: dict[int, int] = field(default_factory=dict)
    """Failed requests, by gRPC status."""
    latencies_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.good / self.seconds

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else math.nan


@dataclass(frozen=True)
class Requests:
    """Encoded requests with their expected answers."""

    bodies: Sequence[bytes]
    answers: Sequence[np.ndarray[Any, np.dtype[np.float32]]]
    _right: set[tuple[int, bytes]] = field(default_factory=set, repr=False)
    """Answers that were found to be right. They are few: comparing bytes costs a hundredth of comparing numbers."""

    @classmethod
    def of(cls, model: str, inputs: Any, outputs: Any) -> Requests:
        bodies = []
        for row in inputs:
            request = oip.ModelInferRequest(model_name=model)
            request.inputs.add(name="input", datatype="FP32", shape=[1, *row.shape])
            request.raw_input_contents.append(row.tobytes())
            data = request.SerializeToString()
            bodies.append(struct.pack(">BI", 0, len(data)) + data)
        return cls(bodies, list(outputs))

    def is_right(self, number: int, body: bytes) -> bool:
        if (number, body) in self._right:
            return True
        response = oip.ModelInferResponse.FromString(body[5:])
        got = np.frombuffer(response.raw_output_contents[0], np.float32)
        is_right = bool(np.allclose(got, self.answers[number], rtol=0, atol=_TOLERANCE))
        if is_right and len(self._right) < _MOST_RIGHT:
            self._right.add((number, body))
        return is_right


class Load:
    """One load on one server."""

    def __init__(
        self,
        address: str,
        requests: Requests,
        *,
        deadline_s: float = math.inf,
        keys: Sequence[str] = (),
        tenants: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Args:
        keys: of the callers, in turn; without any, calls have no key.
        tenants: named by calls without a key, in turn; without any, they name none.
        tls: None: plaintext.
        """
        self._address = address
        self._requests = requests
        self._deadline_s = deadline_s
        self._tls = tls
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https" if tls else b"http"),
            (b":path", _PATH.encode()),
            (b":authority", address.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
        if deadline_s != math.inf:
            headers.append((b"grpc-timeout", b"%dm" % int(deadline_s * 1000)))
        own = [(b"authorization", f"Bearer {key}".encode()) for key in keys]
        own = own or [(TENANT_HEADER.encode(), tenant.encode()) for tenant in tenants]
        self._blocks = [encode([*headers, header]) for header in own]
        self._blocks = self._blocks or [encode(headers)]
        self.count = Count()
        self._next = 0
        self._is_counted = False
        self.is_over = False
        self.is_closed_loop = True

    async def closed(self, in_flight: int, seconds: float, warm_up_s: float = 0.4, on: int = 0) -> Count:
        """Run a closed loop with `in_flight` requests in flight, on so many connections; 0: one, or eight."""
        connections = await self.connect(on or (1 if in_flight <= _ON_ONE else _CONNECTIONS))
        for n in range(in_flight):
            connections[n % len(connections)].ask()
        return await self._measured(connections, seconds, warm_up_s)

    async def open(self, rate: float, seconds: float, warm_up_s: float = 0.5) -> Count:
        """Run an open loop with `rate` requests per second, at random times."""
        self.is_closed_loop = False
        connections = await self.connect(_CONNECTIONS)
        asking = asyncio.create_task(self._ask_at(rate, connections))
        try:
            return await self._measured(connections, seconds, warm_up_s)
        finally:
            asking.cancel()

    async def _ask_at(self, rate: float, connections: Sequence[Connection]) -> None:
        rng = np.random.default_rng(1)
        due, n = time.perf_counter(), 0
        while True:
            now = time.perf_counter()
            while due <= now:
                connections[n % len(connections)].ask()
                due += float(rng.exponential(1 / rate))
                n += 1
            await asyncio.sleep(0.0005)

    async def connect(self, count: int) -> list[Connection]:
        """Open connections."""
        host, _, port = self._address.rpartition(":")
        loop, tls = asyncio.get_running_loop(), self._tls
        made = [await loop.create_connection(lambda: Connection(self), host, int(port), ssl=tls) for _ in range(count)]
        connections = [connection for _, connection in made]
        await asyncio.gather(*(connection.greeted.wait() for connection in connections))
        return connections

    async def _measured(self, connections: Sequence[Connection], seconds: float, warm_up_s: float) -> Count:
        await asyncio.sleep(warm_up_s)
        self._is_counted, start = True, time.perf_counter()
        await asyncio.sleep(seconds)
        self._is_counted, self.is_over = False, True
        self.count.seconds = time.perf_counter() - start
        for connection in connections:
            connection.close()
        return self.count

    def next(self) -> tuple[int, bytes, bytes]:
        """Return the number, header block and body of the next request."""
        number, block = self._next % len(self._requests.bodies), self._blocks[self._next % len(self._blocks)]
        self._next += 1
        return number, block, self._requests.bodies[number]

    def answered(self, number: int, sent: float, status: int, body: bytes) -> None:
        if not self._is_counted:
            return
        took = time.perf_counter() - sent
        if status:
            self.count.by_status[status] = self.count.by_status.get(status, 0) + 1
        elif not self._requests.is_right(number, body):
            self.count.wrong += 1
        elif took > self._deadline_s:
            self.count.late += 1
        else:
            self.count.good += 1
            self.count.latencies_s.append(took)


class Connection(asyncio.Protocol):
    """HTTP/2 client connection, with only the features that a load needs."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._decoder = Decoder(HeaderCache())
        self._rest = b""
        self._number = 1
        self._open: dict[int, tuple[int, float]] = {}
        self._bodies: dict[int, bytes] = {}
        self._window, self._initial = frames.DEFAULT_WINDOW, frames.DEFAULT_WINDOW
        self._credit = 0
        self._held: list[tuple[int, bytes]] = []
        self._out: list[bytes] = []
        self._will_flush = False
        self.greeted = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        settings = frames.settings({frames.TABLE_SIZE: 0, frames.ENABLE_PUSH: 0, frames.WINDOW_SIZE: 1 << 24})
        transport.write(frames.PREFACE + settings + frames.window_update(0, 1 << 30))  # type: ignore[attr-defined]

    def close(self) -> None:
        self._transport.close()

    def ask(self) -> None:
        """Send the next request, or hold it until the flow-control window has capacity."""
        number, block, body = self._load.next()
        stream, self._number = self._number, self._number + 2
        self._open[stream] = number, time.perf_counter()
        self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block))
        if self._held or len(body) > self._window:
            self._held.append((stream, body))
        else:
            self._send(stream, body)
        if not self._will_flush:
            self._will_flush = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _send(self, stream: int, body: bytes) -> None:
        self._window -= len(body)
        for at in range(0, len(body), frames.DEFAULT_FRAME):
            piece = body[at : at + frames.DEFAULT_FRAME]
            last = frames.END_STREAM if at + len(piece) == len(body) else 0
            self._out.append(frames.frame(frames.DATA, last, stream, piece))

    def _flush(self) -> None:
        self._will_flush = False
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while end - at >= frames.HEADER_BYTES:
            high, low, kind, flags, stream = frames.HEADER.unpack_from(data, at)
            stop = at + frames.HEADER_BYTES + (high << 16 | low)
            if stop > end:
                break
            self._on_frame(kind, flags, stream, data[at + frames.HEADER_BYTES : stop])
            at = stop
        self._rest = data[at:]
        self._flush()

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.DATA:
            self._bodies[stream] = self._bodies.get(stream, b"") + payload
            self._credit += len(payload)
            if self._credit > 1 << 24:
                self._out.append(frames.window_update(0, self._credit))
                self._credit = 0
        elif kind == frames.HEADERS:
            block = self._decoder.decode(payload)
            if flags & frames.END_STREAM:
                self._on_end(stream, int(block.by_name.get(b"grpc-status", b"2")))
        elif kind == frames.RST_STREAM and stream in self._open:
            self._on_end(stream, UNAVAILABLE)
        elif kind == frames.SETTINGS and flags & frames.ACK:
            self._decoder.forbid_table()
        elif kind == frames.SETTINGS:
            self._out.append(frames.frame(frames.SETTINGS, frames.ACK, 0))
            self.greeted.set()
        elif kind == frames.PING and not flags & frames.ACK:
            self._out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.WINDOW_UPDATE and not stream:
            self._window += struct.unpack(">I", payload)[0]
            while self._held and len(self._held[0][1]) <= self._window:
                self._send(*self._held.pop(0))

    def _on_end(self, stream: int, status: int) -> None:
        number, sent = self._open.pop(stream)
        self._load.answered(number, sent, status, self._bodies.pop(stream, b""))
        if self._load.is_closed_loop and not self._load.is_over:
            self.ask()
