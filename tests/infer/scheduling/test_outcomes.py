"""One call's end harms no other call: outcomes that are held back, rows that are called off, sweeps of deadlines."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from services.infer import model_stream_infer
from services.infer.core import InferenceServer
from services.infer.model_files.wanted_models import WantedVersion
from services.infer.models.version import Version
from services.infer.scheduling.delivery import PendingRequest
from shoal.errors import DeadlineExceeded, Internal, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.scheduling.outcome_world import FAST, Errors, SteppedLoop, World, outputs_of, request_of, run, value

ROWS = 12


def played(story: Callable[[World], Awaitable[None]]) -> World:
    """Run a story in simulated time. No error is logged, and none reaches the event loop."""
    errors, unhandled = Errors(), []

    async def main(loop: SteppedLoop) -> World:
        loop.set_exception_handler(lambda loop, context: unhandled.append(context))
        world = World(loop)
        async with AsyncExitStack() as stack:
            await world.start(stack)
            await story(world)
            await asyncio.sleep(20)
        return world

    logging.getLogger().addHandler(errors)
    try:
        world = run(main)
    finally:
        logging.getLogger().removeHandler(errors)
    assert (errors.texts, unhandled) == ([], [])
    return world


def hold_first(world: World, target: str) -> None:
    """The next batch of a model takes ten seconds, and each has one row."""
    scheduler: Any = world.versions[target].scheduler
    scheduler._policy = scheduler._queue._policy = type(scheduler._policy)(1, 1 << 20)
    durations = iter([10.0])
    for worker in scheduler._workers:
        worker._cost = lambda rows: next(durations, 0.001)


def users(world: World) -> dict[str, int]:
    return {name: version._users for name, version in world.versions.items() if version._users}


async def called_with_rows(world: World, number: int, target: str = "rows", *, timeout_ms: int = 0) -> None:
    """Call a model for each of ROWS rows: the first row runs for long, the outcomes of the others are held back."""
    world.call(number, target, rows=ROWS, timeout_ms=timeout_ms, is_fast=True)
    await asyncio.sleep(0.005)


def core_of(world: World) -> InferenceServer:
    """Return a core that serves the world's models."""
    models: Any = SimpleNamespace(
        use=lambda name, version: world.versions[name], find=lambda name, version: world.versions[name]
    )
    return InferenceServer(models, "i", world.clock)


def message_of(world: World, target: str) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=target, raw_input_contents=[bytes(8)])
    message.inputs.add(name="x", datatype="FP64", shape=[1, 1])
    return message


async def begin(world: World, target: str, path: str, *, is_late: bool) -> Callable[[], Any]:
    """Make a call; return the function with which its caller leaves, or its deadline passes."""
    if path in ("fast", "slow"):
        world.call(0, target, rows=1, timeout_ms=1000, is_fast=path == "fast")
        return partial(world.expire if is_late else world.disconnect, [0])
    if path == "bulk":
        world.bulk([0], [target], timeout_ms=0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return partial(world.give_up, 0)

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield message_of(world, target)
        await asyncio.Event().wait()

    async def read() -> None:
        core = core_of(world)
        responses = model_stream_infer.stream_responses(
            requests(),
            lambda message, part, raw: core.infer(message, memory=part, raw=raw),
            lambda message, part, raw: core.responses(message, memory=part) if core.is_decoupled(message) else None,
        )
        async with aclosing(responses):
            async for _ in responses:
                pass

    return world._task(read()).cancel


PATHS = [
    (target, path, is_late)
    for target in ("plain", "ordered", "rows", "sequence", "decoupled")
    for path in ("fast", "slow", "bulk", "stream")
    for is_late in (False, True)
    if (target in FAST or path not in ("fast", "bulk"))
    and not (is_late and path in ("bulk", "stream"))
    and (target, path) != ("sequence", "stream")
]


@pytest.mark.parametrize(("target", "path", "is_late"), PATHS)
def test_a_running_call_that_its_caller_leaves_counts_the_same_on_every_path(target, path, is_late):
    model = "ordered" if target == "rows" else target
    before: list[Any] = []

    def counts(world: World, name: str) -> dict[str, int]:
        found = world.versions[name].statistics
        fail = {"fail": found.fail.count, "fail ms": round(found.fail.ns / 1e6), "success": found.success.count}
        return fail | {"cancelled": found.cancelled, "expired": found.expired, "shed": found.shed}

    async def story(world: World) -> None:
        if model in ("plain", "ordered"):
            hold_first(world, model)
        elif model == "sequence":
            for worker in world.versions[model].scheduler._workers:  # type: ignore[attr-defined]
                worker._cost = lambda rows: 10.0
        leave = await begin(world, target, path, is_late=is_late)
        await asyncio.sleep(0.0025)
        leave()
        await asyncio.sleep(0.001)
        before.extend(counts(world, name) for name in (target, model))

    world = played(story)
    left = {"fail": 1, "fail ms": 2, "success": 0, "cancelled": 1, "expired": 0, "shed": 0}
    assert before == [left, left]
    assert [counts(world, name) for name in (target, model)] == before, "after the end of the run"
    assert world.versions[model].statistics.executions == (0 if model == "decoupled" else 1)
    assert users(world) == {}


def test_a_result_that_comes_with_the_cancellation_counts_once():
    async def story(world: World) -> None:
        for number, is_fast in enumerate((True, False)):
            world.call(number, "plain", rows=1, timeout_ms=0, is_fast=is_fast)
        await asyncio.sleep(0)
        world.outcomes.extend = lambda *given, extend=world.outcomes.extend: (  # type: ignore[method-assign]
            extend(*given),
            world.disconnect([0, 1]),
        )

    statistics = played(story).versions["plain"].statistics
    assert (statistics.success.count, statistics.fail.count, statistics.cancelled) == (2, 0, 0)


@pytest.mark.parametrize("target", ["rows", "nested"])
def test_a_client_that_leaves_an_ensemble_disturbs_nobody(target):
    async def story(world: World) -> None:
        hold_first(world, "ordered")
        await called_with_rows(world, 0, target)
        world.call(1, "ordered", rows=1, timeout_ms=0, is_fast=True)
        await asyncio.sleep(0.02)
        world.disconnect([0])
        assert world.clients[0].responses == []

    world = played(story)
    assert outputs_of(world.clients[1].responses[0])[0] == [2 * value(1) + 1]
    assert users(world) == {}


def test_a_row_that_fails_fails_its_request_once_and_no_other():
    async def story(world: World) -> None:
        hold_first(world, "ordered")
        world.models["ordered"].poison.add(value(0) + 0.005)
        await called_with_rows(world, 0)
        await called_with_rows(world, 1)

    world = played(story)
    (error,) = world.clients[0].responses
    assert isinstance(error, Internal)
    assert "row 5 of 12" in error.message
    assert len(outputs_of(world.clients[1].responses[0])[0]) == ROWS
    assert users(world) == {}


def test_a_deadline_in_an_ensemble_leaves_the_deadlines_of_others_in_force():
    async def story(world: World) -> None:
        hold_first(world, "ordered")
        await called_with_rows(world, 0, timeout_ms=30)
        # Of this request, half arrives.
        call = world.half_call(1, timeout_ms=30)
        await asyncio.sleep(0.1)
        assert call.is_over
        assert world.half_call(2, timeout_ms=30).deadline < math.inf
        await asyncio.sleep(0.1)

    world = played(story)
    for number in range(3):
        (error,) = world.clients[number].responses
        assert isinstance(error, DeadlineExceeded)
    assert users(world) == {}


def test_deadlines_that_pass_together_end_each_call_once():
    """A slow request, and quick ones behind it whose outcomes are held back until it expires."""

    async def story(world: World) -> None:
        hold_first(world, "ordered")
        for number in range(7):
            world.call(number, "ordered", rows=1, timeout_ms=60, is_fast=True)
        await asyncio.sleep(0.02)
        world.expire(range(7))

    world = played(story)
    for number in range(7):
        (error,) = world.clients[number].responses
        assert isinstance(error, DeadlineExceeded)
    assert users(world) == {}
    # The six others had been executed.
    assert world.versions["ordered"].statistics.cancelled == 1


def test_entries_of_a_bulk_that_expire_together_end_once():
    async def story(world: World) -> None:
        hold_first(world, "ordered")
        numbers = range(101, 121, 2)
        world.bulk(numbers, ["ordered"] * len(numbers), timeout_ms=30)
        await asyncio.sleep(0.005)
        world.call(0, "ordered", rows=1, timeout_ms=0, is_fast=True)

    world = played(story)
    assert {len(entry.responses) for entry in world.entries.values()} == {1}
    assert outputs_of(world.clients[0].responses[0])[0] == [2 * value(0) + 1]
    assert users(world) == {}


def test_a_response_that_ends_other_calls_does_not_disturb_the_batch_that_it_was_in():
    async def story(world: World) -> None:
        for number in range(6):
            world.call(number, "plain", rows=1, timeout_ms=0, is_fast=True)
        # The first response is written while the others of its batch wait for theirs.
        world.moments = 0
        world.actions = {1: partial(world.disconnect, [1, 3, 5])}

    world = played(story)
    assert [len(world.clients[number].responses) for number in range(6)] == [1, 0, 1, 0, 1, 0]
    assert users(world) == {}


class Leaver:
    """A receiver that abandons other requests when it gets its own outcome."""

    is_direct = False
    writes = False

    def __init__(self, version: Version, outcomes: list[Any]) -> None:
        self.version, self.outcomes, self.victims = version, outcomes, []

    def succeeded(self, result: Any) -> None:
        self.failed(result)

    def failed(self, outcome: Any) -> None:
        self.outcomes.append(self)
        for victim in self.victims:
            self.version.scheduler.abandon(victim)


@pytest.mark.parametrize("target", ["plain", "ordered", "sequence"])
def test_a_receiver_runs_after_the_scheduler_and_may_abandon_the_rest_of_its_batch(target):
    outcomes: list[Leaver] = []

    async def story(world: World) -> None:
        version = world.versions[target]
        leavers = [Leaver(version, outcomes) for _ in range(6)]
        tickets = [
            version.scheduler.start(request_of(3 * n, target, 1), math.inf, "", leaver)
            for n, leaver in enumerate(leavers)
        ]
        leavers[0].victims = tickets[1:]
        assert outcomes == []
        await asyncio.sleep(0.1)
        assert outcomes == [leavers[0]]
        assert [version.scheduler.abandon(ticket) for ticket in tickets] == [False] * 6

    world = played(story)
    assert world.versions[target].statistics.cancelled <= 5


def test_an_unload_ends_within_its_time_whatever_the_model_does():
    responses: dict[str, list[Any]] = {}

    async def story(world: World) -> None:
        for number, target in enumerate(["plain", "ordered", "rows", "nested", "cached", "decoupled"]):
            if target in ("plain", "ordered", "cached"):
                for worker in world.versions[target].scheduler._workers:
                    worker._cost = lambda rows: 10.0
            world.call(number, target, rows=2, timeout_ms=0, is_fast=target != "decoupled")
            world.call(number + 10, target, rows=2, timeout_ms=0, is_fast=False)
        world.streams[:] = []
        world.call(30, "decoupled", rows=1, timeout_ms=0, is_fast=False)
        await asyncio.sleep(0.01)
        # A request whose caller has left still runs.
        world.disconnect([0])
        begun = world.loop.time()
        for version in reversed(world.versions.values()):
            await version.unload(0.05)
        assert world.loop.time() - begun < len(world.versions) * 0.06
        await asyncio.sleep(0.01)
        responses.update({number: client.responses for number, client in world.clients.items()})
        world.call(40, "plain", rows=1, timeout_ms=0, is_fast=False)

    world = played(story)
    assert responses.pop(0) == []
    for number, received in responses.items():
        if number not in (5, 15):
            assert [type(response) for response in received] == [Unavailable], number
    (late,) = world.clients[40].responses
    assert isinstance(late, Unavailable)
    assert users(world) == {}


async def test_a_version_refuses_to_be_left_more_often_than_it_is_used(caplog):
    version = Version("m", WantedVersion(1, "digest", open=lambda: None))
    with version:
        assert version._users == 1
    version.__exit__(None, None, None)
    assert version._users == 0
    assert "a request left the version twice" in caplog.text


def test_a_request_that_is_over_changes_no_more():
    class Receiver:
        is_direct = True
        writes = False
        seen: ClassVar[list[Any]] = []

        def succeeded(self, result: Any) -> None:
            self.seen.append(result)

        def failed(self, error: Any) -> None:
            self.seen.append(error)

    first, second = Internal("first"), Internal("second")
    request = PendingRequest(Receiver())
    assert request.conclude(first)
    assert not request.conclude(second)
    request.deliver()
    request.deliver()
    assert Receiver.seen == [first]
    assert not request.abandon()
    left = PendingRequest(Receiver())
    assert left.abandon()
    assert not left.abandon()
    assert not left.conclude(first)
    left.deliver()
    assert Receiver.seen == [first]
