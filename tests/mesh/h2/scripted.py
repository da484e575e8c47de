"""Peer of the lean client that sends exactly the frames of a test's script."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import hpack

from mesh.h2 import frames
from mesh.rpc.client.channel import Channel
from mesh.rpc.framing import framed

PATIENCE_S = 30.0
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]
LAST = frames.END_HEADERS | frames.END_STREAM


class Request:
    """What came of a call so far."""

    def __init__(self, number: int, headers: dict[str, str]) -> None:
        self.number = number
        self.headers = headers
        self.body = b""
        self.is_ended = False
        self.reset: int | None = None


class Peer:
    """One connection, as its server sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._decoder = hpack.Decoder()
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0
        self.requests: dict[int, Request] = {}
        self.seen: list[tuple[int, int, int, bytes]] = []
        """Every frame: kind, flags, stream, payload."""
        self.is_over = False

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    def block(self, fields: Sequence[tuple[str, str]]) -> bytes:
        return self._encoder.encode(fields)

    def headers(self, number: int, fields: Sequence[tuple[str, str]], flags: int = frames.END_HEADERS) -> bytes:
        return frames.frame(frames.HEADERS, flags, number, self.block(fields))

    def answer(self, number: int, *messages: bytes, end: Sequence[tuple[str, str]] = OK) -> bytes:
        """A whole answer."""
        data = b"".join(frames.frame(frames.DATA, 0, number, framed(message)) for message in messages)
        return self.headers(number, HEAD) + data + self.headers(number, end, LAST)

    def greet(self, settings: dict[int, int] | None = None) -> None:
        self.send(frames.settings(settings or {}))

    async def frame(self) -> tuple[int, int, int, bytes] | None:
        """The next frame that comes; None at the end."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                high, low, kind, flags, number = frames.HEADER.unpack(await self._reader.readexactly(9))
                payload = await self._reader.readexactly(high << 16 | low)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_over = True
            return None
        self.seen.append((kind, flags, number, payload))
        self._note(kind, flags, number, payload)
        return self.seen[-1]

    def _note(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind in (frames.HEADERS, frames.CONTINUATION):
            self._block = payload if kind == frames.HEADERS else self._block + payload
            if kind == frames.HEADERS:
                self._ends = bool(flags & frames.END_STREAM)
            if flags & frames.END_HEADERS:
                self.requests[number] = Request(number, dict(self._decoder.decode(self._block)))
        elif kind == frames.DATA:
            self.requests[number].body += payload
            self.requests[number].is_ended |= bool(flags & frames.END_STREAM)
        elif kind == frames.RST_STREAM and number in self.requests:
            self.requests[number].reset = struct.unpack(">I", payload)[0]

    async def until(self, kind: int, number: int | None = None) -> tuple[int, int, int, bytes]:
        """Reads until a frame of this kind, on this stream if one is named, has come."""
        while (came := await self.frame()) is not None:
            if came[0] == kind and number in (None, came[2]):
                return came
        raise AssertionError(f"the connection ended before a frame of kind {kind} came")

    async def request(self, number: int) -> Request:
        """Reads until the whole of this request is there."""
        while not (number in self.requests and self.requests[number].is_ended):
            assert await self.frame() is not None, f"the connection ended before request {number}"
        return self.requests[number]

    async def until_over(self) -> int | None:
        """Reads until the client has closed the connection: the reason of its GOAWAY."""
        while await self.frame() is not None:
            pass
        goodbyes = [payload for kind, _, _, payload in self.seen if kind == frames.GOAWAY]
        return struct.unpack_from(">I", goodbyes[-1], 4)[0] if goodbyes else None


class Scripted:
    """A listener. Each connection waits to be taken up by `accept`."""

    def __init__(self) -> None:
        self._came: asyncio.Queue[Peer] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", port)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        assert await reader.readexactly(len(frames.PREFACE)) == frames.PREFACE
        self._came.put_nowait(Peer(reader, writer))

    async def accept(self, settings: dict[int, int] | None = None, *, greets: bool = True) -> Peer:
        """The next connection, with our settings sent."""
        peer = await asyncio.wait_for(self._came.get(), PATIENCE_S)
        if greets:
            peer.greet(settings)
        return peer

    def has_another(self) -> bool:
        return not self._came.empty()

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def scripted(**options: object) -> AsyncIterator[tuple[Channel, Scripted]]:
    """A channel to a scripted peer. Nothing of its calls may be left in the end."""
    listener = Scripted()
    await listener.start()
    try:
        async with Channel(listener.address, **options) as channel:
            yield channel, listener
            for line in channel._connections:
                assert not line._calls
                assert not line._sender._window_changes
                assert not line._sender._waiting
            assert not channel._waiting
        assert not channel._connections
    finally:
        await listener.stop()
