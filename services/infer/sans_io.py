"""Thoughts that ask for something to be done between their steps: written once, for those who wait and those who block.

A generator yields what it wants, and is sent what came of it, or thrown what went wrong; in the end it returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar, cast

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")


def run_sync(steps: Generator[Q, A, R], do: Callable[[Q], A]) -> R:
    """What `steps` returns. Raises what it raises."""
    try:
        wanted = next(steps)
        while True:
            try:
                came = do(wanted)
            except Exception as err:
                wanted = steps.throw(err)
            else:
                wanted = steps.send(came)
    except StopIteration as end:
        return cast("R", end.value)


async def run_async(steps: Generator[Q, A, R], do: Callable[[Q], Awaitable[A]]) -> R:
    """The same, where what is wanted is awaited."""
    try:
        wanted = next(steps)
        while True:
            try:
                came = await do(wanted)
            except Exception as err:
                wanted = steps.throw(err)
            else:
                wanted = steps.send(came)
    except StopIteration as end:
        return cast("R", end.value)
