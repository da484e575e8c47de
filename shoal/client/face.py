"""Blocking facade of an async object: the same methods, run on an event loop in a thread.

    class Jobs(SyncFacade[AsyncJobs]):
        get = blocking(AsyncJobs.get)          # async def get(...) -> Job                becomes  def get(...) -> Job
        watch = iterating(AsyncJobs.watch)     # async def watch(...) -> AsyncIterator    becomes  an Iterator

There is one implementation, and a type checker sees the real signature of either variant.
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

from shoal.client.transport import forks
from shoal.errors import Cancelled, FailedPrecondition

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")

# The loop only has cancelled calls to end; a thread that hangs there must not block the exit of the interpreter.
_JOIN_S = 5.0


class _LoopState:
    """Event loop and thread, set at the first use, and the coroutine function that runs before they end."""

    def __init__(self, before_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.before_end = before_end
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None


class LoopThread:
    """Event loop in a thread. It starts with the first `run`.

    It ends with `close`, with the last reference to this object, or with the interpreter. `before_end()` runs first.
    A forked child, where the parent's threads do not exist, starts its own.
    """

    def __init__(self, before_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._lock = threading.Lock()
        self._state = _LoopState(before_end)
        self._end = weakref.finalize(self, _end, self._state)
        forks.renew_in_child(self)

    def after_fork(self) -> None:
        """Drop loop, thread and lock of the parent, in a forked child."""
        self._lock = threading.Lock()
        old = self._state
        if self._end.detach() is not None:
            self._state = _LoopState(old.before_end)
            self._end = weakref.finalize(self, _end, self._state)
        if old.loop is not None:
            # The end of the interpreter would report the parent's tasks as pending.
            old.loop.set_exception_handler(lambda loop, context: None)
        forks.keep(old)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and return its result or raise its error. An interrupt (Ctrl-C) cancels it.

        Raises:
            FailedPrecondition: the loop is closed, or this is its own thread, which cannot wait for itself.
            Cancelled: another thread closed the loop meanwhile.
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
        """Yield the items in the order of arrival. Leaving early closes `items`.

        Raises:
            FailedPrecondition: the process has forked since the first item.
        """
        begun = self._state

        # An interrupted step may still be running when `items` is to be closed.
        step_lock = asyncio.Lock()
        running: asyncio.Task[Any] | None = None

        async def step() -> tuple[T] | None:
            nonlocal running
            async with step_lock:
                running = asyncio.current_task()
                try:
                    return (await anext(items),)
                except StopAsyncIteration:
                    return None
                finally:
                    running = None

        async def end() -> None:
            # `run` cancels an interrupted step, unless the interrupt comes before `run` waits for it.
            if running is not None:
                running.cancel()
            async with step_lock:
                await items.aclose()

        try:
            while (item := self.run(step())) is not None:
                yield item[0]
                if self._state is not begun:
                    raise FailedPrecondition("this iteration belongs to the parent process: begin another one")
        finally:
            if self._end.alive and self._state is begun:
                self.run(end())

    def close(self) -> None:
        """End the loop and its thread. A second call has no effect."""
        with self._lock:
            self._end()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if not self._end.alive:
                raise FailedPrecondition("this client is closed: create a new one")
            state = self._state
            if state.thread is threading.current_thread():
                raise FailedPrecondition(
                    "a callback of this client cannot wait for a call of the same client: make the call elsewhere"
                )
            if state.loop is None:
                state.loop = asyncio.new_event_loop()
                state.thread = threading.Thread(target=_serve, args=(state.loop,), name="shoal-client", daemon=True)
                state.thread.start()
            return state.loop


def _end(state: _LoopState) -> None:
    if state.loop is None or state.thread is None:
        return
    # Garbage collection may run in the loop's own thread, which cannot wait for itself.
    if state.thread is threading.current_thread():
        state.loop.stop()
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(state.before_end(), state.loop).result(_JOIN_S)
    state.loop.call_soon_threadsafe(state.loop.stop)
    state.thread.join(_JOIN_S)


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


class SyncFacade(Generic[A]):
    """Facade whose methods run those of `inner` on `loop`."""

    def __init__(self, inner: A, loop: LoopThread) -> None:
        self._inner = inner
        self._loop = loop


def blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """Return the blocking variant of an async method, for a facade class."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        facade: SyncFacade[A] = self
        return facade._loop.run(method(facade._inner, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


def iterating(
    method: Callable[Concatenate[A, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """Return the blocking variant of an async generator method, for a facade class."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        facade: SyncFacade[A] = self
        return facade._loop.iterate(method(facade._inner, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call
