"""One call on the long way: what an ASGI app receives and sends, on a stream of a sender."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mesh.h2.frames import Reason
from mesh.h2.headers import Block, encode
from mesh.h2.sending import Sender

if TYPE_CHECKING:
    from mesh.asgi.app import GrpcApp


class ClientDisconnectedError(OSError):
    """The caller has gone: nothing can be sent."""


class Stream:
    """Carries one call of a GrpcApp. `taken` hears how many bytes of the request have been taken."""

    def __init__(self, sender: Sender, number: int, taken: Callable[[int], None]) -> None:
        self._sender = sender
        self._number = number
        self._taken = taken
        self._pieces: deque[tuple[bytes, int]] = deque()
        self._is_ended = False
        self._is_gone = False
        self._changed = asyncio.Event()
        self._has_trailers = False
        self._start: dict[str, Any] | None = None

    def start(self, app: GrpcApp, block: Block, peer: tuple[str, int]) -> None:
        """Runs the call in a task of its own."""
        scope = {
            "type": "http",
            "method": block.by_name.get(b":method", b"").decode("latin-1"),
            "path": block.path,
            "headers": [field for field in block.fields if not field[0].startswith(b":")],
            "client": peer,
        }
        self._task = asyncio.create_task(app.serve(scope, self.receive, self.send))
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._sender.reset(self._number, Reason.INTERNAL_ERROR)

    def feed(self, data: bytes, size: int, *, is_end: bool) -> None:
        """A piece of the request, which weighs `size` in the windows."""
        if data or size:
            self._pieces.append((data, size))
        self._is_ended |= is_end
        self._changed.set()

    def disconnect(self) -> None:
        self._is_gone = True
        self._changed.set()

    async def receive(self) -> dict[str, Any]:
        """The next piece; once more when the request has ended; then waits until the caller has gone."""
        while not self._pieces and not self._is_gone and not self._is_ended:
            self._changed.clear()
            await self._changed.wait()
        if self._pieces:
            data, size = self._pieces.popleft()
            self._taken(size)
            return _request(data, more=bool(self._pieces) or not self._is_ended)
        if self._is_ended and not self._is_gone:
            self._is_ended = False
            return _request(b"", more=False)
        while not self._is_gone:
            self._changed.clear()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, event: dict[str, Any]) -> None:
        """Headers go with the first piece of the body. Waits for room. Raises ClientDisconnectedError."""
        if self._is_gone:
            raise ClientDisconnectedError("the caller has gone")
        kind = event["type"]
        if kind == "http.response.start":
            self._start = event
            self._has_trailers = bool(event.get("trailers"))
        elif kind == "http.response.body":
            await self._body(event.get("body", b""), more=bool(event.get("more_body")))
        elif kind == "http.response.trailers":
            self._sender.end(self._number, encode(event["headers"]))

    async def _body(self, data: bytes, *, more: bool) -> None:
        sender, number = self._sender, self._number
        if self._start is not None:
            start, self._start = self._start, None
            block = encode([(b":status", b"%d" % start["status"]), *start["headers"]])
            if not data and not more and not self._has_trailers:
                sender.end(number, block)
                return
            sender.headers(number, block)
        if data:
            sent = asyncio.get_running_loop().create_future()
            sender.data(number, data, lambda: None if sent.done() else sent.set_result(None))
            if more:
                await sent
        if not more and not self._has_trailers:
            sender.end_data(number)


def _request(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}
