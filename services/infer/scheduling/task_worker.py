"""Worker of a model that computes on another server: its batches are tasks of the event loop, without a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

from services.infer.requests.outcome import Outcome
from services.infer.scheduling.execution import ExecutionItem, Executor
from services.infer.scheduling.worker import Done
from shoal.errors import Unavailable

# The loop's timers count milliseconds: one that fires early would only be set again.
_TICK_S = 0.001


class AbandonableItem(ExecutionItem, Protocol):
    """An item that reports when its caller has left."""

    on_abandoned: Callable[[], None] | None
    """Called on the loop, while the item is executed."""


class AsyncExecutor(Executor, Protocol):
    """Runs awaited batches, one at a time."""

    async def outcomes(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        """Return one outcome for each item, in order. Raises only CancelledError, which cancels what it awaits."""


class TaskWorker:
    """A worker.Worker. A batch whose callers have all left is cancelled."""

    def __init__(self, execution: AsyncExecutor, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self.execution: Executor = execution
        self._awaits = execution
        self._loop, self._name = loop, name
        self._task: asyncio.Task[list[Outcome]] | None = None
        self._wake_timer: asyncio.TimerHandle | None = None

    def run(self, items: Sequence[ExecutionItem], done: Done) -> None:
        self._cancel_wake()
        self._task = self._loop.create_task(self._awaits.outcomes(items), name=self._name)
        self._task.add_done_callback(partial(self._on_done, items, done))
        for item in cast("Sequence[AbandonableItem]", items):  # The Scheduler's items are.
            item.on_abandoned = partial(self._abandoned, items)

    def wake_in(self, seconds: float, wake: Callable[[], None]) -> None:
        self._cancel_wake()
        self._wake_timer = self._loop.call_later(max(seconds, _TICK_S), wake)

    def close(self) -> None:
        self._cancel_wake()
        self._cancel_task()

    def _cancel_wake(self) -> None:
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _abandoned(self, items: Sequence[ExecutionItem]) -> None:
        if all(item.is_abandoned for item in items):
            self._cancel_task()

    def _on_done(self, items: Sequence[ExecutionItem], done: Done, task: asyncio.Task[list[Outcome]]) -> None:
        for item in cast("Sequence[AbandonableItem]", items):
            item.on_abandoned = None
        self._task = None
        # Cancelled by this worker: all callers have left, or the model is unloaded without draining.
        unloaded: list[Outcome] = [Unavailable("the model is being unloaded")] * len(items)
        outcomes = unloaded if task.cancelled() else task.result()
        # Waiting takes no processor time.
        done(outcomes, 0.0)
