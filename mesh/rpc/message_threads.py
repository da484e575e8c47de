"""Work on large messages, in threads: zlib and `bytes.join` release the GIL, and the event loop goes on.

start(tenant, work, done) ──> one at a time of each tenant ──> a thread ──> done(result), on the loop
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

# Each holds one message, and a processor: two tenants advance at the same time, and the loop has the rest.
_THREADS = 2

Work = Callable[[], bytes]
Done = Callable[["bytes | BaseException"], None]


class MessageWork:
    """Work on one message, which it refers to until a thread begins."""

    __slots__ = ("done", "work")

    def __init__(self, work: Work, done: Done) -> None:
        self.work: Work | None = work
        self.done: Done | None = done

    def cancel(self) -> None:
        """Drop the message of a call that has ended: its memory counts no more. `done` is not called any more."""
        self.work = self.done = None


class MessageThreads:
    """Runs the work of a server's calls in threads. Calls bound what waits: it is held in their memory account."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._waiting: dict[bytes, deque[MessageWork]] = {}
        """By tenant; a tenant is an entry while something of it runs."""

    def start(self, tenant: bytes, work: Work, done: Done) -> MessageWork:
        """Run `work` after the tenant's earlier work; then `done` with its result or exception, on the loop."""
        begun = MessageWork(work, done)
        waiting = self._waiting.get(tenant)
        if waiting is None:
            self._waiting[tenant] = deque()
            self._submit(tenant, begun)
        else:
            waiting.append(begun)
        return begun

    def _submit(self, tenant: bytes, begun: MessageWork) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "messages")
        self._pool.submit(self._run, tenant, begun)

    def _run(self, tenant: bytes, begun: MessageWork) -> None:
        result: bytes | BaseException = b""
        try:
            work, begun.work = begun.work, None
            if work is not None:
                result = work()
        except BaseException as err:
            result = err
        # The loop is closed: the process ends.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finish, tenant, begun, result)
        # An exception refers to this frame: as a local variable it would keep the message until a garbage collection.
        del result

    def _finish(self, tenant: bytes, begun: MessageWork, result: bytes | BaseException) -> None:
        waiting = self._waiting[tenant]
        while waiting and waiting[0].work is None:
            waiting.popleft()
        if waiting and not self._is_closed:
            self._submit(tenant, waiting.popleft())
        else:
            del self._waiting[tenant]
        # An exception refers to the thread's frame, and so to `begun`: it must not lead to the call, which may keep the
        # exception.
        done, begun.done = begun.done, None
        try:
            if done is not None:
                done(result)
        except Exception:
            log.exception("a call failed after a thread had worked on its message", {"event": "call.message_failed"})

    def close(self) -> None:
        """Start nothing more. What runs ends within a second, by its bound of bytes."""
        self._is_closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
