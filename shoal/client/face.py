"""The blocking face of an async object: the same methods, run on an event loop of its own in a thread of its own.

    class Jobs(Face[AsyncJobs]):
        get = blocking(AsyncJobs.get)          # async def get(...) -> Job                becomes  def get(...) -> Job
        watch = iterating(AsyncJobs.watch)     # async def watch(...) -> AsyncIterator    becomes  an Iterator

There is one implementation, and a type checker sees the real signature of either face.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from shoal.errors import FailedPrecondition

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")

_JOIN_S = 5.0
# At the end the loop has only cancelled calls to see off; a thread that hangs there must not hold up the interpreter.


class LoopThread:
    """An event loop in a thread. It starts with the first `run` and ends with `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns or raises. An interrupt (Ctrl-C) cancels it.

        Raises:
            FailedPrecondition: this is closed.
        """
        try:
            loop = self._started()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items, one by one, as they come. Leaving early closes `items`."""

        async def step() -> tuple[T] | None:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self.run(step())) is not None:
                yield item[0]
        finally:
            if not self._closed:
                self.run(items.aclose())

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Runs `last()`, ends the loop and its thread. Does nothing the second time."""
        with self._lock:
            closed, self._closed = self._closed, True
            loop, thread = self._loop, self._thread
        if closed or loop is None or thread is None:
            return
        if last is not None:
            try:
                asyncio.run_coroutine_threadsafe(last(), loop).result(_JOIN_S)
            except TimeoutError:
                pass
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise FailedPrecondition("this client is closed: make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name="shoal-client", daemon=True)
                self._thread.start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


class Face(Generic[A]):
    """An object whose methods run those of `inner` on `loop`."""

    def __init__(self, inner: A, loop: LoopThread) -> None:
        self._inner = inner
        self._loop = loop


def blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """The blocking twin of an async method, for a Face."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        face: Face[A] = self
        return face._loop.run(method(face._inner, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


def iterating(
    method: Callable[Concatenate[A, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """The blocking twin of an async generator method, for a Face."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        face: Face[A] = self
        return face._loop.iterate(method(face._inner, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call
