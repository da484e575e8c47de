"""Threads for the rows of one execution, for work that lets go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")
S = TypeVar("S")


class RowThreads:
    """As many as a model may use for one execution. The calling thread waits; a single row is run on it."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count, thread_name_prefix=name) if count > 1 else None
        """For kernels that share out their work themselves; None: there is one thread, the caller's."""

    def map(self, work: Callable[[S], R], rows: Sequence[S]) -> list[R]:
        """The results in order. Raises what `work` raises first."""
        if self.pool is None or len(rows) < 2:
            return [work(row) for row in rows]
        return list(self.pool.map(work, rows))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
