"""Blocking work beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """One pool of threads. Use as `with`; leaving waits for what runs."""

    def __init__(self, workers: int, name: str = "beside-the-loop") -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs `work` in a thread. A cancelled caller still waits for it: no thread works on behind its back."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # Looked at, or asyncio complains that nobody did.
            raise
