"""HTTP/2 client without checks or deadlines of its own, which also sends broken requests."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import h2.config
import h2.connection
import h2.events

from tests.http2 import Answer
from tests.mesh.rpc.fronts.service import path

Headers = list[tuple[str, str]]


@dataclass
class Exchange(Answer):
    """One call that is under way: what has come of its answer, and what may be waited for."""

    ended: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class RawConnection:
    """Use as `async with`. With `reads` False it never opens its windows again: the server has to wait."""

    def __init__(self, address: str, *, reads: bool = True) -> None:
        self._address = address
        self._reads = reads
        self.streams: dict[int, Exchange] = {}
        self.closed = asyncio.Event()
        self.goaway = asyncio.Event()

    async def __aenter__(self) -> RawConnection:
        if self._address.startswith("unix:"):
            self._reader, self._writer = await asyncio.open_unix_connection(self._address.removeprefix("unix:"))
        else:
            host, _, port = self._address.rpartition(":")
            self._reader, self._writer = await asyncio.open_connection(host, int(port))
        settings = h2.config.H2Configuration(
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self._h2 = h2.connection.H2Connection(settings)
        self._h2.initiate_connection()
        await self.flush()
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._writer.close()

    def cut(self) -> None:
        """The connection is gone, without a word."""
        self._writer.transport.abort()

    async def flush(self) -> None:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()

    async def read_on(self) -> None:
        """Open the windows for what has come, and for all that comes."""
        self._reads = True
        for number, exchange in self.streams.items():
            self._h2.acknowledge_received_data(len(exchange.data), number)
        await self.flush()

    async def open(
        self,
        method: str,
        order: Any = None,
        *,
        without: str = "",
        body: bytes = b"",
        end: bool = False,
        verb: str = "POST",
        **extra: str,
    ) -> int:
        """Sends the headers of a call, and `body`. Returns the stream's number.

        `extra` replaces or adds headers ('_' is '-').
        """
        headers = {
            ":method": verb,
            ":scheme": "http",
            ":path": path(method),
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        if order is not None:
            headers["x-do"] = json.dumps(order)
        headers |= {key.replace("_", "-"): value for key, value in extra.items()}
        headers.pop(without, None)
        number = self._h2.get_next_available_stream_id()
        self.streams[number] = Exchange()
        self._h2.send_headers(number, list(headers.items()), end_stream=end and not body)
        if body:
            self._h2.send_data(number, body, end_stream=end)
        await self.flush()
        return number

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Sends `data` as the windows allow, and the end of the stream."""
        while data:
            room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
            if room <= 0:
                self.streams[number].changed.clear()
                await asyncio.wait_for(self.streams[number].changed.wait(), 30)
                continue
            self._h2.send_data(number, data[:room])
            data = data[room:]
            await self.flush()
        if end:
            self._h2.end_stream(number)
            await self.flush()

    async def reset(self, number: int) -> None:
        self._h2.reset_stream(number, 8)
        await self.flush()

    async def ended(self, number: int) -> Exchange:
        """Waits for the end of the stream: its status, a reset, or the end of the connection."""
        await asyncio.wait_for(self.streams[number].ended.wait(), 30)
        return self.streams[number]

    async def call(self, method: str, body: bytes, order: Any = None, **extra: str) -> Exchange:
        number = await self.open(method, order, **extra)
        await self.send(number, body, end=True)
        return await self.ended(number)

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                for event in self._h2.receive_data(data):
                    self._on(event)
                await self.flush()
        except OSError:
            pass
        finally:
            self.closed.set()
            for exchange in self.streams.values():
                exchange.ended.set()
                exchange.changed.set()

    def _on(self, event: Any) -> None:
        match event:
            case h2.events.ConnectionTerminated():
                self.goaway.set()
            case h2.events.WindowUpdated(stream_id=0) | h2.events.RemoteSettingsChanged():
                for exchange in self.streams.values():
                    exchange.changed.set()
        exchange = self.streams.get(getattr(event, "stream_id", 0) or 0)
        if exchange is None:
            return
        match event:
            case h2.events.ResponseReceived():
                exchange.headers = dict(event.headers)
            case h2.events.TrailersReceived():
                exchange.trailers = dict(event.headers)
            case h2.events.DataReceived():
                exchange.data += event.data
                if self._reads and event.flow_controlled_length:
                    self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamReset():
                exchange.reset = int(event.error_code)
                exchange.ended.set()
            case h2.events.StreamEnded():
                exchange.ended.set()
        exchange.changed.set()
