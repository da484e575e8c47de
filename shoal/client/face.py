"""The blocking face of an async object: the same methods, run on an event loop of its own in a thread of its own.

    class Jobs(Face[AsyncJobs]):
        get = blocking(AsyncJobs.get)          # async def get(...) -> Job                becomes  def get(...) -> Job
        watch = iterating(AsyncJobs.watch)     # async def watch(...) -> AsyncIterator    becomes  an Iterator

There is one implementation, and a type checker sees the real signature of either face.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from shoal.errors import Cancelled, FailedPrecondition

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")

_JOIN_S = 5.0
# At the end the loop has only cancelled calls to see off; a thread that hangs there must not hold up the interpreter.


class _Home:
    """The loop and its thread, once they are needed, and the last thing to do on it."""

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.last = last
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None


class LoopThread:
    """An event loop in a thread. It starts with the first `run`; it ends with `close`, with the last reference to this,
    or with the interpreter, whichever is first. `last()` runs on it before it ends.
    """

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._lock = threading.Lock()
        self._home = _Home(last)
        self._end = weakref.finalize(self, _end, self._home)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns or raises. An interrupt (Ctrl-C) cancels it.

        Raises:
            FailedPrecondition: this is closed.
            Cancelled: it is closed meanwhile, by another thread.
        """
        try:
            loop = self._started()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed while the call was in flight") from None
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items, one by one, as they come. Leaving early closes `items`."""

        turn = asyncio.Lock()  # A step that was interrupted may still be on its way out when `items` is to be closed.

        async def step() -> tuple[T] | None:
            async with turn:
                try:
                    return (await anext(items),)
                except StopAsyncIteration:
                    return None

        async def end() -> None:
            async with turn:
                await items.aclose()

        try:
            while (item := self.run(step())) is not None:
                yield item[0]
        finally:
            if self._end.alive:
                self.run(end())

    def close(self) -> None:
        """Ends the loop and its thread. Does nothing the second time."""
        with self._lock:
            self._end()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if not self._end.alive:
                raise FailedPrecondition("this client is closed: make a new one")
            home = self._home
            if home.loop is None:
                home.loop = asyncio.new_event_loop()
                home.thread = threading.Thread(target=_serve, args=(home.loop,), name="shoal-client", daemon=True)
                home.thread.start()
            return home.loop


def _end(home: _Home) -> None:
    if home.loop is None or home.thread is None:
        return
    if home.thread is threading.current_thread():  # Collected as garbage right there: it cannot wait for itself.
        home.loop.stop()
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(home.last(), home.loop).result(_JOIN_S)
    home.loop.call_soon_threadsafe(home.loop.stop)
    home.thread.join(_JOIN_S)


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
