"""Tasks that somebody owns: how they begin, and how they surely end."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from shoal.errors import ShoalError

log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN_S = 2.0
# Longer than any good-bye of ours (1 s), which a second cancellation would cut short.


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels the tasks and waits until they are done. Raises nothing of theirs.

    The cancellation is repeated, because a library may swallow it: pymongo takes one for a broken connection, and
    mends that.
    """
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_AGAIN_S)


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Does all of it at once; gives what each gives, in order.

    The first error ends the others, which are done with when it is raised: as itself, and not in a group.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            begun = [tasks.create_task(work) for work in works]
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
    else:
        return [task.result() for task in begun]
    raise first  # Out here, so that the group is not told as its cause.


async def whatever_happens(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all of it at once, each to its end: for good-byes, of which none may be cut short. Then the first error."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def log_failure(task: asyncio.Task[Any]) -> None:
    """Tells the log when the task has ended with an error: for tasks that nobody awaits."""
    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=error)


async def for_ever(
    what: str, step: Callable[[], Awaitable[float]], *, away_s: float, log: logging.Logger, level: int = logging.WARNING
) -> NoReturn:
    """Takes a step again and again; it says for how many seconds it may rest.

    What it raises goes to the log, and the next step is `away_s` seconds later.

    Args:
        what: "cannot <what> for now", says the log.
        level: of what the step knows to raise (ShoalError). Anything else is a fault of ours, and must not end it.
    """
    while True:
        try:
            rest_s = await step()
        except ShoalError as err:
            log.log(level, "cannot %s for now: %s", what, err)
            rest_s = away_s
        except Exception:
            log.exception("cannot %s", what)
            rest_s = away_s
        await asyncio.sleep(rest_s)


class Background(ABC):
    """Runs `_run` beside an `async with` block, and no longer than that."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=type(self).__name__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(self._task)
        log_failure(self._task)

    @abstractmethod
    async def _run(self) -> None:
        """Goes on until it is cancelled."""
