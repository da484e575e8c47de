"""Fast unary methods that are coroutine functions: one task for each call, and nothing else of the slow path.

body ──> task: parse ──> response        client disconnected, or deadline passed ──> task cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar

from mesh.process.tasks import end
from mesh.rpc.fast_call import FastCall, FastHandler
from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.interceptors import log_error
from mesh.rpc.parsing import Parser, parse_in_turn
from shoal.errors import ShoalError, Unavailable

# Without a sampled span, a task keeps the context of its call: none.
_NO_SPAN: AbstractContextManager[Any] = contextlib.nullcontext()


Headers: TypeAlias = Mapping[bytes, bytes]


class Message(Protocol):
    """A protobuf message."""

    def SerializeToString(self) -> bytes: ...


Q = TypeVar("Q")


class TaskMethods:
    """Makes fast handlers of coroutine functions. Use as `async with` around the server: leaving ends their tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TaskMethods:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._tasks)

    def method(
        self, path: str, parse: Callable[[bytes], Q], respond: Callable[[Q, Headers], Coroutine[Any, Any, Message]]
    ) -> dict[str, FastHandler]:
        """Return the handler of one method, by its path (`/package.Service/Method`).

        `respond` is called with the request and the headers of its call.
        """

        parser = Parser(parse)

        def handle(body: bytes, call: FastCall) -> None:
            async def answer() -> Message:
                message = await parse_in_turn(call.heavy, call.tenant, parser, body, PREFIX_BYTES)
                return await respond(message, call.headers)

            with call.span.current() if call.span is not None else _NO_SPAN:
                task = asyncio.create_task(_reply(path, answer, call), name=path)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # The boolean that `cancel` returns is not used.
            call.on_end = task.cancel  # type: ignore[assignment]
            call.is_task = True

        return {path: handle}


async def _reply(path: str, answer: Callable[[], Coroutine[Any, Any, Message]], call: FastCall) -> None:
    began = time.monotonic()
    try:
        message = (await answer()).SerializeToString()
    except asyncio.CancelledError:
        # No effect when the call is over: its client has disconnected, or its deadline has passed.
        call.refuse(Unavailable("this instance is stopping"))
        raise
    # SystemExit, too: an exception of one call must not end the others.
    except BaseException as err:
        # `refuse` logs the errors that are not ShoalErrors.
        if isinstance(err, ShoalError):
            log_error(path, err)
        call.refuse(err, time.monotonic() - began)
    else:
        call.reply_after((message,), len(message), time.monotonic() - began)
