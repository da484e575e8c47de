"""Owned tasks: start them, run them together, end them reliably."""

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

# Longer than any clean-up in this project (1 s), which a second cancellation would cut short.
_AGAIN_S = 2.0
# Cancellations of a call that come together: its deadline passes, and its client leaves. `end` repeats its own later.
_TOGETHER_S = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until they are done. Their exceptions are not raised.

    The cancellation is repeated, because a library may swallow it: pymongo treats one as a broken connection and
    reconnects.
    """
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_AGAIN_S)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. A cancellation takes effect when `work` has ended; a later one cancels `work`.

    For a command to MongoDB: pymongo closes the connection of one that is cancelled, and MongoDB works on it for up to
    half a second more. Clients that call and leave would otherwise make all calls wait for new connections.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        clock = asyncio.get_running_loop().time
        until = clock() + _TOGETHER_S
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                if clock() >= until:
                    await end(task)
        # The error of a call that nobody waits for.
        if not task.cancelled():
            task.exception()
        raise


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all coroutines concurrently and return their results in order.

    The first error cancels the others. It is raised after they have ended, as itself and not in a group.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            begun = [tasks.create_task(work) for work in works]
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
    else:
        return [task.result() for task in begun]
    # Outside of the except block, so that the group does not become its context.
    raise first


async def all_to_the_end(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all coroutines concurrently, each to its end, then raise the first error. For clean-up steps."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def log_failure(task: asyncio.Task[Any]) -> None:
    """Log the error of a task that has failed. For tasks that nobody awaits."""
    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
        log.error("%(task)s failed", {"event": "task.failed", "task": task.get_name()}, exc_info=error)


async def for_ever(
    what: str, step: Callable[[], Awaitable[float]], *, away_s: float, log: logging.Logger, level: int = logging.WARNING
) -> NoReturn:
    """Call `step` again and again; its result is the pause in seconds before the next call.

    An error of `step` is logged, and the next call follows `away_s` seconds later.

    Args:
        what: completes the log message "cannot <what> for now".
        level: log level for a ShoalError. Any other exception is a bug; it is logged as an error and retried too.
    """
    while True:
        try:
            rest_s = await step()
        except ShoalError as err:
            log.log(
                level, "cannot %(doing)s for now: %(error)s", {"event": "task.retrying", "doing": what, "error": err}
            )
            rest_s = away_s
        except Exception:
            log.exception("cannot %(doing)s", {"event": "task.unexpected_error", "doing": what})
            rest_s = away_s
        await asyncio.sleep(rest_s)


class Background(ABC):
    """Base class: runs `_run` in a task while the `async with` block runs."""

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
        """Run until cancelled."""
