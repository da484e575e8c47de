"""Worker of one instance of a model: runs its batches beside the event loop, one at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter_ns, thread_time_ns
from typing import Protocol, TypeAlias

from services.infer.requests.outcome import Outcome
from services.infer.scheduling.execution import ExecutionItem, Executor

Done: TypeAlias = Callable[[Sequence[Outcome], float], None]
"""Called on the loop with one outcome for each item, and the processor seconds of the run."""


class Worker(Protocol):
    """Runs the batches of one instance."""

    execution: Executor

    def run(self, items: Sequence[ExecutionItem], done: Done) -> None:
        """Run a batch; the previous one must be done."""

    def wake_in(self, seconds: float, wake: Callable[[], None]) -> None:
        """Call `wake` on the loop after `seconds`, unless the worker is used before. Only while idle."""

    def close(self) -> None:
        """Stop the worker, which is idle."""


class ThreadWorker:
    """A thread with an inbox: a batch is handed to it once, and its outcomes are handed back once."""

    def __init__(self, execution: Executor, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self.execution = execution
        self._loop = loop
        self._inbox: SimpleQueue[tuple[Sequence[ExecutionItem], Done] | tuple[float, Callable[[], None]] | None] = (
            SimpleQueue()
        )
        # A daemon thread: a process that is killed does not wait for a model. An orderly stop closes the workers.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, items: Sequence[ExecutionItem], done: Done) -> None:
        self._inbox.put((items, done))

    def wake_in(self, seconds: float, wake: Callable[[], None]) -> None:
        # The loop's own timers count milliseconds; waiting for the inbox is exact to some fifty microseconds.
        self._inbox.put((max(seconds, 0.0), wake))

    def close(self) -> None:
        self._inbox.put(None)

    def _work(self) -> None:
        task = self._inbox.get()
        while task is not None:
            what, then = task
            if isinstance(what, float):
                task = self._wait_or_wake(what, then)  # type: ignore[arg-type]
                continue
            self._on_loop(partial(then, *self._run(what)))  # type: ignore[call-arg]
            # Without `del`, a worker that waits keeps the requests of its last batch.
            del task, what, then
            task = self._inbox.get()

    def _wait_or_wake(
        self, seconds: float, wake: Callable[[], None]
    ) -> tuple[Sequence[ExecutionItem], Done] | tuple[float, Callable[[], None]] | None:
        try:
            return self._inbox.get(timeout=seconds)
        except Empty:
            self._on_loop(wake)
            return self._inbox.get()

    def _run(self, items: Sequence[ExecutionItem]) -> tuple[Sequence[Outcome], float]:
        start, cpu = perf_counter_ns(), thread_time_ns()
        outcomes = self.execution.run(items)
        # Time this thread waited for (the interpreter's lock, a core) is not a cost of the model.
        return outcomes, min(perf_counter_ns() - start, thread_time_ns() - cpu) / 1e9

    def _on_loop(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # The loop is closed: no caller waits.
            self._loop.call_soon_threadsafe(callback)
