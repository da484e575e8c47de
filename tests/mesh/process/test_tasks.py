"""Owned tasks end with their owner, whatever they do with a cancellation."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mesh.process.tasks import Background, all_to_the_end, end, for_ever, together, uninterrupted
from shoal.errors import NotFound, Unavailable


async def test_a_task_that_swallows_its_cancellation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.process.tasks._AGAIN_S", 0.01)
    swallowed = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end(task)
    assert swallowed.is_set()
    assert task.cancelled()


class Command:
    """Work that waits, and cleans up when it is cancelled."""

    def __init__(self) -> None:
        self.may_end, self.may_leave = asyncio.Event(), asyncio.Event()
        self.events: list[str] = []

    async def run(self) -> str:
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.events.append("interrupted")
            await self.may_leave.wait()
            self.events.append("left")
            raise
        self.events.append("ended")
        return "done"


async def cancelled(task: asyncio.Task[str], times: int) -> None:
    for _ in range(times):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)


async def test_work_goes_on_when_its_deadline_passes_and_its_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.process.tasks._TOGETHER_S", 3_600.0)
    command = Command()
    task = asyncio.create_task(uninterrupted(command.run()))
    await asyncio.sleep(0)
    await cancelled(task, 3)
    assert not task.done()
    command.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert command.events == ["ended"]


async def test_a_later_cancellation_interrupts_work_and_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.process.tasks._TOGETHER_S", 0.0)
    monkeypatch.setattr("mesh.process.tasks._AGAIN_S", 3_600.0)
    command = Command()
    task = asyncio.create_task(uninterrupted(command.run()))
    await asyncio.sleep(0)
    await cancelled(task, 1)
    assert command.events == []
    await cancelled(task, 1)
    assert (command.events, task.done()) == (["interrupted"], False)
    command.may_leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert command.events == ["interrupted", "left"]


async def test_a_task_that_has_ended_is_ignored() -> None:
    async def failing() -> None:
        raise ValueError("why")

    task = asyncio.create_task(failing())
    await asyncio.wait([task])
    await end(task)
    assert isinstance(task.exception(), ValueError)


async def test_a_background_task_ends_with_its_block_and_its_failure_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Ticking(Background):
        async def _run(self) -> None:
            self.started = True
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("why")

    with caplog.at_level(logging.ERROR):
        async with Ticking() as ticking:
            await asyncio.sleep(0)
            assert ticking.started
            assert not ticking._task.done()
    assert ticking._task.done()
    assert "why" in caplog.text


async def test_a_failed_step_is_repeated_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    came: list[str] = []
    third = asyncio.Event()

    async def step() -> float:
        came.append("step")
        if len(came) == 1:
            raise Unavailable("the tide is out")
        if len(came) == 2:
            raise ValueError("a fault of ours")
        third.set()
        return 3_600.0

    with caplog.at_level(logging.INFO):
        log = logging.getLogger("tide")
        task = asyncio.create_task(for_ever("fish", step, away_s=0.0, log=log, level=logging.INFO))
        await asyncio.wait_for(third.wait(), 30)
        await end(task)
    assert len(came) == 3  # Then it rested for as long as it said.
    told = [(record.name, record.levelno, record.getMessage()) for record in caplog.records if record.name == "tide"]
    assert told == [
        ("tide", logging.INFO, "cannot fish for now: the tide is out"),
        ("tide", logging.ERROR, "cannot fish"),
    ]
    assert "a fault of ours" in caplog.text


async def test_together_returns_results_in_order() -> None:
    async def one(n: int) -> int:
        for _ in range(9 - n):
            await asyncio.sleep(0)
        return n

    assert await together(one(n) for n in range(9)) == list(range(9))
    assert await together([]) == []


async def test_together_ends_the_others_and_raises_the_first_error_itself() -> None:
    ended: list[int] = []

    async def one(n: int) -> None:
        try:
            if n == 3:
                await asyncio.sleep(0)
                raise Unavailable("the first") from OSError("its cause")
            await asyncio.Event().wait()
        finally:
            ended.append(n)
            if n == 5:
                raise NotFound("a later one")

    with pytest.raises(Unavailable, match="the first") as caught:
        await together(one(n) for n in range(8))
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(ended) == list(range(8))


async def test_together_that_is_cancelled_ends_all() -> None:
    ended: list[int] = []
    begun = asyncio.Event()

    async def one(n: int) -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.append(n)

    task = asyncio.create_task(together(one(n) for n in range(4)))
    await begun.wait()
    await end(task)
    assert task.cancelled()
    assert sorted(ended) == list(range(4))


async def test_clean_up_steps_run_to_their_end_when_one_fails() -> None:
    said: list[str] = []

    async def short() -> None:
        raise Unavailable("nobody is there")

    async def long() -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        said.append("good-bye")

    with pytest.raises(Unavailable, match="nobody is there"):
        await all_to_the_end([long(), short(), long()])
    assert said == ["good-bye", "good-bye"]
