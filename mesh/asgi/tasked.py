"""Unary methods on the short way whose answers are awaited: a task for each call, and nothing else of the long way.

body ──parsed──> task ──> answer        the caller gone, its deadline past ──> the task is cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError

from mesh.asgi.exchange import Exchange, ShortHandler
from mesh.asgi.framing import PREFIX_BYTES
from mesh.interceptors import log_error, malformed
from mesh.tasks import end
from shoal.errors import ShoalError, Unavailable


class Message(Protocol):
    """A message of protobuf."""

    def SerializeToString(self) -> bytes: ...


Q = TypeVar("Q")


class Tasked:
    """Makes short handlers of coroutine functions. Use as `async with` around the server: leaving ends their tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Tasked:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._tasks)

    def method(
        self, path: str, parse: Callable[[bytes], Q], answer: Callable[[Q], Coroutine[Any, Any, Message]]
    ) -> dict[str, ShortHandler]:
        """The handler of one method, by its path (`/package.Service/Method`)."""

        def handle(body: bytes, exchange: Exchange) -> None:
            try:
                request = parse(body[PREFIX_BYTES:])
            except DecodeError as err:
                raise malformed(len(body) - PREFIX_BYTES, err) from err
            task = asyncio.create_task(_see_through(path, answer, request, exchange), name=path)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            exchange.on_end = task.cancel  # type: ignore[assignment] # What it returns is nobody's.

        return {path: handle}


async def _see_through(
    path: str, answer: Callable[[Q], Coroutine[Any, Any, Message]], request: Q, exchange: Exchange
) -> None:
    try:
        message = (await answer(request)).SerializeToString()
    except asyncio.CancelledError:
        exchange.refuse(Unavailable("this instance is stopping"))  # Nothing, when nobody waits any more.
        raise
    except BaseException as err:  # SystemExit too: what one call raises must not end the others.
        if isinstance(err, ShoalError):  # Of others `refuse` tells the log.
            log_error(path, err)
        exchange.refuse(err)
    else:
        exchange.reply((message,), len(message))
