"""Heavy work: one step at a time, tenants in turn, and the event loop in between. Time is simulated."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rpc.heavy_work import HeavyWork, Steps

PATIENCE_S = 30
MS = 0.001


class World:
    """Heavy work on a clock that only steps and iterations of the event loop advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.heavy = HeavyWork(lambda: self.now)
        self.order: list[str] = []
        self.is_running = False

    def steps(self, name: str, times_s: Sequence[float], error: Exception | None = None) -> Steps[str]:
        for time_s in times_s:
            assert not self.is_running
            self.is_running = True
            self.now += time_s
            self.order.append(name)
            self.is_running = False
            yield
        if error is not None:
            raise error
        return name

    def start(self, name: str, times_s: Sequence[float], tenant: str = "t") -> asyncio.Task[str]:
        return asyncio.create_task(self.heavy.run(tenant.encode(), self.steps(name, times_s)))

    async def others(self, time_s: float) -> None:
        """One iteration of the event loop, in which others work for `time_s`."""
        self.now += time_s
        await asyncio.sleep(0)


async def test_work_runs_at_once_when_the_loop_had_its_time() -> None:
    world = World()
    world.now = 1.0
    task = world.start("a", [MS])
    await asyncio.sleep(0)
    assert task.done()


async def test_a_turn_ends_when_it_has_taken_its_time() -> None:
    world = World()
    task = world.start("a", [0.6 * MS] * 10)
    for turns in range(1, 6):
        await world.others(MS)
        assert len(world.order) == 2 * turns
        # Others have three times as long: 3.6 ms.
        for _ in range(3):
            await world.others(MS)
            assert len(world.order) == 2 * turns
    assert await asyncio.wait_for(task, PATIENCE_S) == "a"


async def test_a_busy_loop_has_three_times_as_long_as_a_turn() -> None:
    world = World()
    task = world.start("a", [10 * MS] * 2)
    await world.others(0)
    assert world.order == ["a"]
    for _ in range(29):
        await world.others(MS)
        assert world.order == ["a"]
    await world.others(MS)
    await world.others(MS)
    assert world.order == ["a", "a"]
    task.cancel()


async def test_an_idle_loop_runs_a_turn_in_each_iteration() -> None:
    world = World()
    task = world.start("a", [10 * MS] * 5)
    for _ in range(7):
        await world.others(0)
    assert task.done()


async def test_cheap_work_of_many_shares_a_turn() -> None:
    world = World()
    world.now = 1.0
    tasks = [world.start(str(n), [MS / 200]) for n in range(100)]
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == 100


async def test_tenants_take_turns_and_the_work_of_one_is_done_in_order() -> None:
    world = World()
    tasks = [world.start(f"a{n}", [5 * MS] * 2, "a") for n in range(3)]
    tasks += [world.start("b", [5 * MS] * 2, "b"), world.start("c", [5 * MS] * 2, "c")]
    await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
    # The first step of a0 ran before there was anything else, and its end was a turn, too.
    assert world.order == ["a0", "a0", "b", "c", "b", "c", "a1", "a1", "a2", "a2"]


async def test_work_of_a_tenant_ends_while_another_tenants_waits() -> None:
    world = World()
    flood = [world.start(f"a{n}", [5 * MS] * 4, "a") for n in range(50)]
    await world.others(0)
    late = world.start("b", [5 * MS] * 4, "b")
    assert await asyncio.wait_for(late, PATIENCE_S) == "b"
    assert sum(task.done() for task in flood) <= 4
    for task in flood:
        task.cancel()


async def test_cancelled_work_runs_no_further_step_and_is_freed() -> None:
    world = World()
    tasks = [world.start(f"a{n}", [5 * MS] * 1000) for n in range(5)]
    await world.others(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=PATIENCE_S)
    assert all(task.cancelled() for task in tasks)
    assert not world.heavy._waiting
    steps = len(world.order)
    for _ in range(10):
        await world.others(1.0)
    assert len(world.order) == steps


async def test_an_error_ends_its_work_alone() -> None:
    world = World()
    failed = asyncio.create_task(world.heavy.run(b"t", world.steps("a", [5 * MS] * 3, ValueError("a step"))))
    other = world.start("b", [5 * MS] * 3)
    with pytest.raises(ValueError, match="a step"):
        await asyncio.wait_for(failed, PATIENCE_S)
    assert await asyncio.wait_for(other, PATIENCE_S) == "b"


class Body:
    """Stands for a large body."""


async def fails(world: World, *, in_thread: bool) -> None:
    def steps(body: Body) -> Steps[None]:
        def work() -> None:
            assert body is not None
            raise ValueError("a thread")

        yield from world.steps("a", [5 * MS] * 3)
        if in_thread:
            yield work
        work()

    with pytest.raises(ValueError, match="a thread"):
        # Not `wait_for`, whose own frame and future would be a cycle.
        await world.heavy.run(b"t", steps(Body()))


@pytest.mark.parametrize("in_thread", [False, True])
async def test_work_that_fails_is_freed_without_a_garbage_collection(in_thread: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        await fails(World(), in_thread=in_thread)
        async with asyncio.timeout(PATIENCE_S):
            while any(isinstance(each, Body) for each in gc.get_objects()):
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_a_function_runs_in_a_thread_while_others_have_their_turns() -> None:
    world, may_end = World(), threading.Event()
    found: list[int] = []

    def steps() -> Steps[list[int]]:
        yield from world.steps("a", [5 * MS])
        yield lambda: found.append(threading.get_ident() if may_end.wait(PATIENCE_S) else 0)
        yield from world.steps("a", [5 * MS])
        return found

    task = asyncio.create_task(world.heavy.run(b"t", steps()))
    other = world.start("b", [5 * MS] * 3)
    assert await asyncio.wait_for(other, PATIENCE_S) == "b"
    assert world.order == ["a", "b", "b", "b"]
    may_end.set()
    (thread,) = await asyncio.wait_for(task, PATIENCE_S)
    assert thread != threading.get_ident()
    assert world.order[-1] == "a"


async def test_work_that_is_cancelled_while_a_thread_has_it_ends_at_once() -> None:
    world, may_end, has_begun = World(), threading.Event(), threading.Event()

    def work() -> None:
        has_begun.set()
        may_end.wait(PATIENCE_S)

    def steps() -> Steps[None]:
        yield work
        world.order.append("after")

    task = asyncio.create_task(world.heavy.run(b"t", steps()))
    async with asyncio.timeout(PATIENCE_S):
        while not has_begun.is_set():
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE_S)
    assert task.cancelled()
    may_end.set()
    assert await asyncio.wait_for(world.start("b", [5 * MS]), PATIENCE_S) == "b"
    assert world.order == ["b"]


WORK = st.tuples(
    st.sampled_from("abc"),
    st.lists(st.sampled_from([MS / 10, MS, 10 * MS]), max_size=6),
    st.sampled_from(["ends", "ends", "fails", "is cancelled"]),
)
EVENTS = st.lists(st.one_of(WORK, st.sampled_from([0.0, MS / 10, 20 * MS])), max_size=25)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_whatever_happens_all_work_ends_once_and_none_is_left(events: list[object]) -> None:
    async def live() -> None:
        world = World()
        tasks = []
        for number, event in enumerate(events):
            if isinstance(event, float):
                await world.others(event)
                continue
            tenant, times_s, end = event  # type: ignore[misc]
            error = ValueError("a step") if end == "fails" else None
            steps = world.steps(str(number), times_s, error)
            task = asyncio.create_task(world.heavy.run(tenant.encode(), steps))
            tasks.append((str(number), len(times_s), end, task))
            if end == "is cancelled":
                await world.others(0)
                task.cancel()
        if tasks:
            await asyncio.wait([task for *_, task in tasks], timeout=PATIENCE_S)
        for name, count, end, task in tasks:
            assert task.done()
            if end == "ends":
                assert task.result() == name
            elif end == "fails":
                assert isinstance(task.exception(), ValueError)
            assert world.order.count(name) == count or end == "is cancelled"
        assert not world.heavy._waiting
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not world.heavy._is_scheduled

    asyncio.run(live())
