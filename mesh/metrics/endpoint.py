"""Pages for operators and Prometheus over HTTP/1.1: GET only, at a unix socket or a loopback port.

httptools reads the requests. A web page cannot read one: the host name must be one of the address's own, which a
name that was bound again (DNS rebinding) is not, and no other origin is allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

import httptools

from mesh.process import sockets

CONNECTIONS = 32
"""Connections at a time: scrapers and people. Further ones are closed."""
HEAD_BYTES = 16 << 10
"""Bytes of a request, of which only the head is read: a request with a body is refused."""
IDLE_S = 60.0
"""Time for which a connection may send nothing: four scrapes of 15 s."""
WRITE_S = 30.0
"""Time in which a response must be read."""
PAGE_S = 30.0
"""Time in which a page must be made."""
OPENMETRICS = "application/openmetrics-text"
"""Type of a page in OpenMetrics, without its version. Readers of exemplars, such as Prometheus, name it in `Accept`."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a page."""

    path: str
    query: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    """A response: status, content type and body."""

    status: int
    content_type: str
    body: bytes


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}
_REASONS |= {431: "Request Header Fields Too Large", 502: "Bad Gateway", 503: "Service Unavailable"}


def text(status: int, message: str) -> Response:
    """Return a response of one line of text."""
    return Response(status, "text/plain; charset=utf-8", f"{message}\n".encode())


@dataclass(slots=True)
class _Head:
    """Parser callbacks of httptools: the head of one request."""

    url: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    is_whole: bool = False
    has_body: bool = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.has_body = True

    def on_message_complete(self) -> None:
        self.is_whole = True


class Endpoint:
    """Serves pages by path, while the block lasts. Use as `async with`.

    Args:
        listen: `unix:/path` or `host:port`; port 0 is any free one.
        pages: handlers by path; `*` gets every other path.
        names: host names that a request may have besides the local ones. A unix socket takes every name.

    Raises (on entering):
        OSError: the address cannot be bound.
    """

    def __init__(self, listen: str, pages: Mapping[str, Handler], names: Collection[str] = ()) -> None:
        self._pages = pages
        self._names = None if listen.startswith("unix:") else {*LOCAL_NAMES, *names}
        self._open: dict[asyncio.Task[None], asyncio.WriteTransport] = {}
        self.address = listen
        """The address, with the port that was chosen for port 0."""

    async def __aenter__(self) -> Endpoint:
        if self.address.startswith("unix:"):
            sockets.prepare(self.address)
            path = self.address.removeprefix("unix:")
            self._server = await asyncio.start_unix_server(self._serve, path, limit=HEAD_BYTES)
            os.chmod(path, 0o600)
        else:
            host, _, port = self.address.rpartition(":")
            self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=HEAD_BYTES)
            self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.close()
        for transport in self._open.values():
            transport.abort()
        if self._open:
            await asyncio.wait(self._open)
        sockets.remove(self.address)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is served by a task"
        self._open[task] = writer.transport
        # `drain` waits until all is written.
        writer.transport.set_write_buffer_limits(0)
        try:
            if len(self._open) <= CONNECTIONS:
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    while await self._respond(reader, writer):
                        pass
        finally:
            del self._open[task]
            writer.close()

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read a request and write its response. Return True when the connection takes another request."""
        try:
            async with asyncio.timeout(IDLE_S):
                raw = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            await self._write(writer, text(431, f"the request's head is larger than {HEAD_BYTES} bytes"), False, False)
            return False
        head = _Head()
        parser = httptools.HttpRequestParser(head)
        try:
            parser.feed_data(raw)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as err:
            await self._write(writer, text(400, f"not a request of HTTP/1.1: {err}"), False, False)
            return False
        method = parser.get_method()
        # Not `should_keep_alive`: it is reset at the end of a request.
        closes = "close" in head.headers.get("connection", "").lower()
        lives = head.is_whole and not closes and parser.get_http_version() == "1.1"
        response = await self._page(method, head)
        await self._write(writer, response, method == b"HEAD", lives)
        return lives

    async def _page(self, method: bytes, head: _Head) -> Response:
        if method not in (b"GET", b"HEAD"):
            return text(405, "this address is for reading: GET and HEAD only")
        if not head.is_whole or head.has_body:
            return text(400, "a request without a body is expected")
        name = head.headers.get("host", "")
        if self._names is not None and _without_port(name) not in self._names:
            return text(
                403, f"the host name {name[:255]!r} is not one of this address: {', '.join(sorted(self._names))}"
            )
        try:
            url = httptools.parse_url(head.url)
        except httptools.HttpParserInvalidURLError:
            return text(400, "the request's path is malformed")
        path = (url.path or b"/").decode("latin-1")
        handler = self._pages.get(path) or self._pages.get("*")
        if handler is None:
            return text(404, f"there is no {path[:255]}: expected {', '.join(sorted(self._pages))}")
        try:
            async with asyncio.timeout(PAGE_S):
                return await handler(Request(path, (url.query or b"").decode("latin-1"), head.headers))
        except TimeoutError:
            return text(503, f"the page took longer than {PAGE_S:.0f} s")

    async def _write(self, writer: asyncio.StreamWriter, response: Response, is_head: bool, lives: bool) -> None:
        lines = (
            f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Other')}",
            f"content-type: {response.content_type}",
            f"content-length: {len(response.body)}",
            "cache-control: no-store",
            "x-content-type-options: nosniff",
            f"connection: {'keep-alive' if lives else 'close'}",
        )
        writer.write("\r\n".join((*lines, "\r\n")).encode("latin-1"))
        if not is_head:
            writer.write(response.body)
        try:
            async with asyncio.timeout(WRITE_S):
                await writer.drain()
        except TimeoutError:
            # Nobody reads: a closed transport would hold the page until somebody does.
            writer.transport.abort()
            raise


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdigit() else host.lower()
