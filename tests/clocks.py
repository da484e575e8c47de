"""A clock for objects that take one as an argument."""

from __future__ import annotations


class Seconds:
    """A monotonic clock that moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now
