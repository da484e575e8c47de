"""Finding the guilty in a batch that fails: halves of halves, so that one of n costs about 2 log2 n runs.

    [a b c d e f g h] fails ──> [a b c d] is fine, [e f g h] fails ──> [e f] is fine, [g h] fails ──> g, h alone

When many are guilty, halving only adds runs that fail: after a few too many of them, the rest is run one by one. So a
batch of n in which all fail costs at most n + 4 log2 n + 8 runs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Bisection(Generic[J, R]):
    """For one batch that failed as a whole."""

    def __init__(self, run: Callable[[Sequence[J]], list[R]], excused: Callable[[Exception], R]) -> None:
        """`run` gives a result for each job, or raises for all of them; `excused` is the result of a guilty one."""
        self._run = run
        self._excused = excused
        self._patience = 0
        self.cuts = 0
        """How often a batch was cut in two."""

    def outcomes(self, batch: Sequence[J]) -> list[R]:
        """One result for each job, in order. `batch`, of more than one, has just failed."""
        self._patience = 2 * len(batch).bit_length()
        return self._halves(batch)

    def _halves(self, batch: Sequence[J]) -> list[R]:
        if self._patience <= 0:
            return [result for job in batch for result in self._part([job])]
        self.cuts += 1
        middle = len(batch) // 2
        return self._part(batch[:middle]) + self._part(batch[middle:])

    def _part(self, batch: Sequence[J]) -> list[R]:
        try:
            return self._run(batch)
        except Exception as err:
            if len(batch) == 1:
                return [self._excused(err)]
            self._patience -= 1
            return self._halves(batch)
