"""A client of HTTP/1.1 that sends any bytes, and reads responses as they are framed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

PATIENCE_S = 30.0


@dataclass
class Response:
    """One response."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str) -> RawClient:
        if address.startswith("unix:"):
            return cls(*await asyncio.open_unix_connection(address.removeprefix("unix:"), limit=1 << 27))
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), limit=1 << 27))

    async def __aenter__(self) -> RawClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.transport.abort()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def request(self, method: str, path: str, body: bytes | None = None, *more: str) -> Response:
        """Send a request, and return its response."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", *more]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
        return await self.response(has_body=method != "HEAD")

    async def response(self, *, has_body: bool = True) -> Response:
        """Return the next response; 100 Continue is one of its own."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            found = Response(int(head[0].split()[1]), headers)
            if not has_body or found.status == 100:
                return found
            if headers.get("transfer-encoding") == "chunked":
                while (size := int((await self.reader.readuntil(b"\r\n")).strip(), 16)) > 0:
                    found.chunks.append(await self.reader.readexactly(size))
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
                found.body = b"".join(found.chunks)
            elif "content-length" in headers:
                found.body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                found.body = await self.reader.read()
            return found

    async def until_closed(self) -> bytes:
        """Return what arrives until the server has closed the connection."""
        found = b""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while data := await self.reader.read(1 << 16):
                    found += data
            except ConnectionError:
                pass
        return found
