"""Threads for the rows of one execution, for work that releases the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")
S = TypeVar("S")


class RowThreads:
    """Threads that one execution may use. The calling thread waits; a single row runs on the calling thread."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count, thread_name_prefix=name) if count > 1 else None
        """For kernels that split their work themselves; None: only the calling thread is used."""

    def map(self, work: Callable[[S], R], rows: Sequence[S]) -> list[R]:
        """Return the results in the order of the rows. Raises the first error of `work`."""
        if self.pool is None or len(rows) < 2:
            return [work(row) for row in rows]
        return list(self.pool.map(work, rows))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
