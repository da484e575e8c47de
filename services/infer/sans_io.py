"""Sans-I/O generators: one piece of logic that runs blocking (`run_sync`) or awaited (`run_async`).

A generator yields an operation. The runner performs it, and sends its result or throws its error into the generator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar, cast

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")


def run_sync(steps: Generator[Q, A, R], perform: Callable[[Q], A]) -> R:
    """Run a generator with blocking operations. Returns and raises as the generator does."""
    try:
        operation = next(steps)
        while True:
            try:
                result = perform(operation)
            except Exception as err:
                operation = steps.throw(err)
            else:
                operation = steps.send(result)
    except StopIteration as end:
        return cast("R", end.value)


async def run_async(steps: Generator[Q, A, R], perform: Callable[[Q], Awaitable[A]]) -> R:
    """Run a generator with awaited operations. Returns and raises as the generator does."""
    try:
        operation = next(steps)
        while True:
            try:
                result = await perform(operation)
            except Exception as err:
                operation = steps.throw(err)
            else:
                operation = steps.send(result)
    except StopIteration as end:
        return cast("R", end.value)
