"""Reading of a page of metrics over HTTP/1.1, bounded in size and time."""

from __future__ import annotations

import asyncio

import httptools

from mesh.metrics.endpoint import Response


class _Answer:
    """Parser callbacks of httptools: one response."""

    def __init__(self, most_bytes: int) -> None:
        self.content_type = "text/plain"
        self.body = bytearray()
        self.is_whole = False
        self._most_bytes = most_bytes

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.content_type = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > self._most_bytes:
            raise ValueError(f"the page is larger than {self._most_bytes >> 20} MiB")

    def on_message_complete(self) -> None:
        self.is_whole = True


async def fetch(address: str, target: str, accept: str = "", *, timeout_s: float, most_bytes: int) -> Response:
    """Return the response to a GET at `unix:/path` or `host:port`. `accept` is the header of that name.

    Raises:
        OSError: nobody listens. TimeoutError: it takes longer. ValueError: not a response, or a larger one.
    """
    answer = _Answer(most_bytes)
    parser = httptools.HttpResponseParser(answer)
    async with asyncio.timeout(timeout_s):
        if address.startswith("unix:"):
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            head = f"GET {target} HTTP/1.1\r\nhost: localhost\r\naccept: {accept}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode("latin-1"))
            while not answer.is_whole:
                block = await reader.read(1 << 16)
                if not block:
                    raise ValueError("the connection was closed before the end of the response")
                try:
                    parser.feed_data(block)
                except httptools.HttpParserError as err:
                    raise ValueError(f"not a response: {err}") from None
        finally:
            writer.close()
    return Response(parser.get_status_code(), answer.content_type, bytes(answer.body))
