"""Each call ends exactly once, with its own answer, whatever its clients and models do at whatever moment."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, Unavailable
from tests.infer.scheduling.outcome_world import (
    FAST,
    TARGETS,
    Errors,
    SteppedLoop,
    World,
    is_own,
    outputs_of,
    run,
    value,
)
from tests.long_form import by_form


@dataclass(frozen=True)
class Call:
    """One call of a story."""

    target: str
    gap_ms: int
    rows: int
    timeout_ms: int
    is_fast: bool
    is_poison: bool


calls = st.lists(
    st.builds(
        Call,
        target=st.sampled_from(TARGETS),
        gap_ms=st.sampled_from([0, 0, 0, 1, 3]),
        rows=st.integers(1, 4),
        timeout_ms=st.sampled_from([0, 0, 5, 20, 60]),
        is_fast=st.sampled_from([True, True, False]),
        is_poison=st.sampled_from([False] * 5 + [True]),
    ),
    min_size=1,
    max_size=24,
)
actions = st.lists(
    st.tuples(
        st.integers(1, 300),
        st.sampled_from(["disconnect one", "disconnect", "expire", "give up", "lose process"]),
        st.integers(0, 23),
    ),
    max_size=30,
    unique_by=lambda action: action[0],
)
BULK = range(100, 112)


def act(world: World, what: str, which: int) -> None:
    if what == "disconnect one":
        world.disconnect([which])
    elif what == "disconnect":
        # Calls of one connection.
        world.disconnect([number for number in world.calls if number % 4 == which % 4])
    elif what == "expire":
        world.expire([number for number in world.calls if number % 3 == which % 3])
    elif what == "give up":
        world.give_up(BULK[which % len(BULK)])
    else:
        handlers = world.streams[which % 2]._handlers
        lost = list(handlers.values())
        handlers.clear()
        for handler in lost:
            handler(None)


async def play(
    story: list[Call], interference: list[tuple[int, str, int]], bulk: bool, drain_s: float, loop: SteppedLoop
) -> World:
    world = World(loop)
    async with AsyncExitStack() as stack:
        await world.start(stack)
        world.actions = {moment: partial(act, world, what, which) for moment, what, which in interference}
        loop.on_step = world.on_moment
        if bulk:
            world.bulk(BULK, [FAST[number % len(FAST)] for number in BULK], timeout_ms=7)
        for number, call in enumerate(story):
            if call.gap_ms:
                await asyncio.sleep(call.gap_ms / 1000)
            if call.is_poison and call.target in world.models:
                world.models[call.target].poison.add(value(number))
            if call.is_poison and call.target in ("rows", "nested"):
                world.models["ordered"].poison.add(value(number))
            world.call(
                number,
                call.target,
                rows=call.rows,
                timeout_ms=call.timeout_ms,
                is_fast=call.is_fast,
            )
        # Ensembles are unloaded before their models.
        for version in reversed(world.versions.values()):
            await asyncio.wait_for(version.unload(drain_s), drain_s + 0.01)
        # The callers of requests that are ended by an unload are told in the same iteration of the loop, or soon after.
        while not all(call.is_over for call in world.calls.values()) or not all(task.done() for task in world.tasks):
            assert loop.time() < 600, "calls hang"
            await asyncio.sleep(0.01)
        loop.on_step = lambda: None
    return world


@settings(max_examples=by_form(120, 1500), deadline=None)
@given(story=calls, interference=actions, bulk=st.booleans(), drain_s=st.sampled_from([0.0, 0.004, 100.0, 100.0]))
def test_each_call_ends_once_with_its_own_answer(story, interference, bulk, drain_s):
    errors = Errors()
    logging.getLogger().addHandler(errors)
    try:
        world = run(partial(play, story, interference, bulk, drain_s))
    finally:
        logging.getLogger().removeHandler(errors)
    assert errors.texts == []
    for name, version in world.versions.items():
        assert version._users == 0, name
    for number, call in enumerate(story):
        client = world.clients[number]
        assert len(client.responses) == (0 if client.is_cancelled else 1), (number, call)
        for response in client.responses:
            check(number, call, response, world, drain_s)
    # The other models are called by ensembles, too.
    for target in ("quick rows", "nested", "sequence", "cached", "decoupled"):
        counted = world.versions[target].statistics
        total = counted.success.count + counted.fail.count
        # A flight of the cache that ends while its last caller leaves counts beside that caller.
        assert total == world.begun[target] or (target == "cached" and total > world.begun[target]), target
    for entry in world.entries.values():
        assert len(entry.responses) == 1 or (entry.is_given_up and not entry.responses), entry.number
        for response in entry.responses:
            if isinstance(response, bytes):
                assert is_own(entry.number, FAST[entry.number % len(FAST)], 1, outputs_of(response, prefix=0))
    for task in world.tasks:
        assert task.cancelled() or task.exception() is None


def check(number: int, call: Call, response: Any, world: World, drain_s: float) -> None:
    if isinstance(response, bytes):
        assert is_own(number, call.target, call.rows, outputs_of(response)), (number, call)
        assert not call.is_poison or call.target in ("quick rows", "decoupled", "cached"), call
    elif isinstance(response, DeadlineExceeded):
        assert call.timeout_ms or call.target == "cached"
    elif isinstance(response, Internal):
        assert call.is_poison or call.target in ("cached", "decoupled"), response
    elif isinstance(response, Unavailable):
        assert "being unloaded" in response.message
    elif isinstance(response, InvalidArgument):
        assert call.target == "sequence", response
    else:
        assert isinstance(response, ResourceExhausted), response
