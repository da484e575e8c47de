"""Thread pool for blocking work beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """Thread pool. Use as `with`; leaving waits for the running work."""

    def __init__(self, workers: int, name: str = "beside-the-loop") -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `work` in a thread. A cancelled caller waits for the thread, so that no work outlives its caller."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                # Retrieved, so that asyncio does not log it as unhandled.
                future.exception()
            raise
