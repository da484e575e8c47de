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


class MessageThreads:
    """Runs the work of a server's calls in threads. Calls bound what waits: it is held in their memory account."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._waiting: dict[bytes, deque[tuple[Work, Done]]] = {}
        """By tenant; a tenant is an entry while something of it runs."""

    def start(self, tenant: bytes, work: Work, done: Done) -> None:
        """Run `work` after the tenant's earlier work; then `done` with its result or exception, on the loop."""
        waiting = self._waiting.get(tenant)
        if waiting is None:
            self._waiting[tenant] = deque()
            self._submit(tenant, work, done)
        else:
            waiting.append((work, done))

    def _submit(self, tenant: bytes, work: Work, done: Done) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "messages")
        self._pool.submit(self._run, tenant, work, done)

    def _run(self, tenant: bytes, work: Work, done: Done) -> None:
        result: bytes | BaseException
        try:
            result = work()
        except BaseException as err:
            result = err
        # The loop is closed: the process ends.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finish, tenant, done, result)
        # An exception refers to this frame: as a local variable it would keep the message until a garbage collection.
        del result

    def _finish(self, tenant: bytes, done: Done, result: bytes | BaseException) -> None:
        waiting = self._waiting[tenant]
        if waiting and not self._is_closed:
            self._submit(tenant, *waiting.popleft())
        else:
            del self._waiting[tenant]
        try:
            done(result)
        except Exception:
            log.exception("a call failed after a thread had worked on its message")

    def close(self) -> None:
        """Start nothing more. What runs ends within a second, by its bound of bytes."""
        self._is_closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
