"""Blocking work in threads: a cancelled caller waits for its thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mesh.process.threads import Threads


async def test_results_and_errors_come_back() -> None:
    with Threads(1) as threads:
        assert await threads.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 7, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_waits_for_its_thread(fails: bool) -> None:
    started, go, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go.wait(30)
        done.set()
        if fails:
            raise OSError("too late to matter")

    with Threads(1) as threads:
        task = asyncio.create_task(threads.run(work))
        await asyncio.to_thread(started.wait, 30)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()
