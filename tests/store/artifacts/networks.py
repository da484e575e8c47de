"""A network between a store and its object store, which a test can slow, stop and spoil."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

_CHUNK = 64 << 10


class Network:
    """Passes bytes on to `endpoint` (`http://host:port`), as it is told to at the moment."""

    def __init__(self, endpoint: str) -> None:
        url = urlsplit(endpoint)
        self._host, self._port = url.hostname, url.port
        self.endpoint = ""
        self.passing = asyncio.Event()
        """Cleared: connections stay open, and nothing moves."""
        self.passing.set()
        self.pause_s = 0.0
        """Before each 64 KiB, either way."""
        self.spoils = b""
        """Where this is found in what is sent up, its first byte is changed."""
        self.passed = 0
        """Bytes that were sent up so far."""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Network]:
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._connection(reader, writer)
            writer.close()
            tasks.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        ways = [
            asyncio.create_task(self._pass(reader, up_writer, is_up=True)),
            asyncio.create_task(self._pass(up_reader, writer, is_up=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            up_writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool) -> None:
        while data := await reader.read(_CHUNK):
            await self.passing.wait()
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            if is_up:
                data = self._spoilt(data)
                self.passed += len(data)
            writer.write(data)
            await writer.drain()

    def _spoilt(self, data: bytes) -> bytes:
        at = data.find(self.spoils) if self.spoils else -1
        return data if at < 0 else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
