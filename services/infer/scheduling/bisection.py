"""Bisection of a failed batch: halves of halves, so that finding 1 failing item among n takes about 2 log2 n runs.

    [a b c d e f g h] fails ──> [a b c d] is fine, [e f g h] fails ──> [e f] is fine, [g h] fails ──> g, h alone

When many items fail, halving only adds runs that fail: after a few too many of them, the rest run one by one. A batch
of n in which all fail takes at most n + 4 log2 n + 8 further runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Generic, TypeAlias, TypeVar

from services.infer import sans_io

J = TypeVar("J")
R = TypeVar("R")

Search: TypeAlias = Generator[Sequence[J], list[R], list[R]]


class Bisection(Generic[J, R]):
    """Search for the failing items of one batch. A run gives an outcome for each item, or raises for all of them."""

    def __init__(self, outcome_of_error: Callable[[Exception], R]) -> None:
        """Set the outcome of an item that fails alone: `outcome_of_error` of its error."""
        self._outcome_of_error = outcome_of_error
        self._failures_left = 0
        self.cuts = 0
        """Number of batches that were split in two."""

    def outcomes(self, batch: Sequence[J], run: Callable[[Sequence[J]], list[R]]) -> list[R]:
        """Run the halves of a failed batch until the failing items are alone; return one outcome per item, in order.

        `batch` has more than one item.
        """
        return sans_io.run_sync(self._search(batch), run)

    async def outcomes_async(self, batch: Sequence[J], run: Callable[[Sequence[J]], Awaitable[list[R]]]) -> list[R]:
        """Return the same as `outcomes`, with an awaited run."""
        return await sans_io.run_async(self._search(batch), run)

    def _search(self, batch: Sequence[J]) -> Search[J, R]:
        """Yield batches to run; each is sent its outcomes."""
        self._failures_left = 2 * len(batch).bit_length()
        return self._halves(batch)

    def _halves(self, batch: Sequence[J]) -> Search[J, R]:
        if self._failures_left <= 0:
            outcomes: list[R] = []
            for item in batch:
                outcomes += yield from self._run_part([item])
            return outcomes
        self.cuts += 1
        middle = len(batch) // 2
        first = yield from self._run_part(batch[:middle])
        return first + (yield from self._run_part(batch[middle:]))

    def _run_part(self, batch: Sequence[J]) -> Search[J, R]:
        try:
            return (yield batch)
        except Exception as err:
            if len(batch) == 1:
                return [self._outcome_of_error(err)]
            self._failures_left -= 1
        return (yield from self._halves(batch))
