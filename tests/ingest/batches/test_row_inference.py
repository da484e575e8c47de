"""Stacks against models that fail: each good row is answered; what happened to a row alone is held against it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.batches.outputs.part_summary import RowError
from services.ingest.batches.row_inference import (
    FailedRow,
    RequestSlots,
    RowInference,
    Split,
    SucceededRows,
    Wait,
    decide,
)
from services.ingest.batches.rows.fitting import fit
from services.ingest.batches.rows.stacking import Stack
from services.ingest.batches.rows.wire import ModelTarget
from services.ingest.job import Failure, Policy
from shoal.errors import Code
from shoal.inference.v2 import inference_pb2 as oip
from tests.ingest.batches.making import DOUBLE

AT_ONCE = Policy(max_attempts=3, initial_backoff_ms=0, max_backoff_ms=0)


class Doubling:
    """Doubles rows; `fails(rows)` says how a call of rows (by their first value) fails, if it does."""

    def __init__(self, fails: Callable[[list[int]], Failure | None]) -> None:
        self.fails = fails
        self.under_way = 0
        self.calls: list[list[int]] = []
        self.exclusive: Counter[int] = Counter()

    async def infer(
        self, request: bytes, timeout_s: float, tenant: str = "", caller: bytes = b""
    ) -> oip.ModelInferResponse | Failure:
        message = oip.ModelInferRequest.FromString(request)
        x = np.frombuffer(message.raw_input_contents[0], np.float32).reshape(-1, 4)
        rows = x[:, 0].astype(int).tolist()
        self.under_way += 1
        self.calls.append(rows)
        was_alone = self.under_way == 1
        await asyncio.sleep(0)
        was_alone = was_alone and self.under_way == 1
        self.under_way -= 1
        if (failure := self.fails(rows)) is not None:
            if len(rows) == 1 and was_alone:
                self.exclusive[rows[0]] += 1
            return failure
        answer = oip.ModelInferResponse(model_version="3", raw_output_contents=[(x * 2).tobytes()])
        answer.outputs.add(name="y", datatype="FP32", shape=x.shape)
        return answer


async def run(model: Doubling, count: int, per_stack: int, slots: int = 4, notes: list[str] | None = None) -> Any:
    """Every outcome, of stacks that are all under way at once."""
    inputs = [fit(DOUBLE.inputs[0], np.repeat(np.arange(count, dtype=np.float32), 4).reshape(count, 4))]
    told = [] if notes is None else notes
    row_inference = RowInference(
        model,
        ModelTarget("m", "", DOUBLE),
        RequestSlots(slots),
        policy=AT_ONCE,
        timeout_s=5,
        on_wait=told.append,
        draw=lambda: 0.0,
    )
    stacks = [Stack(tuple(range(at, min(at + per_stack, count)))) for at in range(0, count, per_stack)]
    found = await asyncio.gather(*(row_inference.infer(inputs, stack) for stack in stacks))
    return [outcome for outcomes in found for outcome in outcomes]


def rows_of(outcomes: list[SucceededRows | FailedRow]) -> tuple[dict[int, float], dict[int, RowError]]:
    answered: dict[int, float] = {}
    dead: dict[int, RowError] = {}
    for outcome in outcomes:
        if isinstance(outcome, FailedRow):
            dead[outcome.row] = outcome.error
        else:
            answered.update(zip(outcome.rows, outcome.outputs["y"][:, 0].tolist(), strict=True))
    return answered, dead


@given(
    bad=st.dictionaries(
        st.integers(0, 39),
        st.sampled_from([Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED]),
        max_size=6,
    ),
    per_stack=st.integers(1, 16),
)
def test_only_the_rows_that_are_to_blame_are_dead(bad: dict[int, Code], per_stack: int) -> None:
    def fails(rows: list[int]) -> Failure | None:
        hit = [row for row in rows if row in bad]
        return Failure(bad[hit[0]], f"row {hit[0]}") if hit else None

    model = Doubling(fails)
    outcomes = asyncio.run(run(model, 40, per_stack))
    answered, dead = rows_of(outcomes)
    assert answered == {row: 2.0 * row for row in range(40) if row not in bad}
    assert {row: each.code for row, each in dead.items()} == {row: code.name for row, code in bad.items()}
    assert sorted(outcome.row if isinstance(outcome, FailedRow) else outcome.rows[0] for outcome in outcomes) == [
        outcome.row if isinstance(outcome, FailedRow) else outcome.rows[0] for outcome in outcomes
    ]
    for row, code in bad.items():
        assert dead[row].attempts == (1 if code is Code.INVALID_ARGUMENT else AT_ONCE.max_attempts)


async def test_a_row_that_kills_its_instance_takes_nobody_with_it() -> None:
    """Whatever is under way when an instance dies fails too: here, every call that overlaps one with the bad row."""
    poison, dying = 13, 0

    def fails(rows: list[int]) -> Failure | None:
        nonlocal dying
        if poison in rows:
            dying = 3  # Of the calls that follow, those that were under way.
            return Failure(Code.UNAVAILABLE, "reset")
        if dying and model.under_way:
            dying -= 1
            return Failure(Code.UNAVAILABLE, "reset")
        return None

    model = Doubling(fails)
    answered, dead = rows_of(await run(model, 64, 8))
    assert [*dead] == [poison]
    assert answered == {row: 2.0 * row for row in range(64) if row != poison}
    assert model.exclusive[poison] == AT_ONCE.max_attempts


async def test_what_reaches_no_model_is_tried_for_as_long_as_it_takes() -> None:
    left = 20

    def fails(rows: list[int]) -> Failure | None:
        nonlocal left
        left -= 1
        codes = (Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
        return Failure(codes[left % 3], "away", is_reached=False) if left > 0 else None

    notes: list[str] = []
    import services.ingest.batches.row_inference as row_inference

    wait = row_inference.refused_wait_ms
    row_inference.refused_wait_ms = lambda refusals, drawn: 0.0
    try:
        answered, dead = rows_of(await run(Doubling(fails), 16, 8, notes=notes))
    finally:
        row_inference.refused_wait_ms = wait
    assert len(answered) == 16
    assert not dead
    assert any("away" in note for note in notes)
    assert notes[-1] == ""


@pytest.mark.parametrize(
    ("failure", "rows", "attempts", "expected"),
    [
        (Failure(Code.UNAVAILABLE, "", is_reached=False, retry_after_ms=700), 8, 9, Wait(700, False)),
        (Failure(Code.NOT_FOUND, ""), 1, 99, Wait(100, False)),
        (Failure(Code.INVALID_ARGUMENT, ""), 2, 1, Split(False)),
        (Failure(Code.UNAVAILABLE, ""), 2, 1, Split(True)),
        (Failure(Code.INVALID_ARGUMENT, "m"), 1, 1, RowError("INVALID_ARGUMENT", "m", 1)),
        (Failure(Code.INTERNAL, "m"), 1, 3, RowError("INTERNAL", "m", 3)),
        (Failure(Code.INTERNAL, "m"), 1, 2, Wait(0, True)),
        (Failure(99, "m"), 1, 3, RowError("code 99", "m", 3)),
    ],
    ids=str,
)
def test_decisions(failure: Failure, rows: int, attempts: int, expected: Any) -> None:
    assert decide(failure, rows=rows, attempts=attempts, refusals=0, policy=AT_ONCE, drawn=0.0) == expected


async def test_a_call_alone_is_alone_and_cancelled_callers_leave_no_hole() -> None:
    slots = RequestSlots(3)
    inside = 0
    most_beside = 0

    async def call(exclusive: bool) -> None:
        nonlocal inside, most_beside
        async with slots.acquired("a", exclusive=exclusive):
            inside += 1
            if exclusive:
                most_beside = max(most_beside, inside)
            await asyncio.sleep(0)
            inside -= 1

    tasks = [asyncio.create_task(call(n % 5 == 0)) for n in range(50)]
    await asyncio.sleep(0)
    for task in tasks[3::7]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most_beside == 1
    async with asyncio.timeout(30):
        await asyncio.gather(*(call(True) for _ in range(5)))


async def test_calls_of_a_tenant_with_a_slow_model_leave_slots_to_others() -> None:
    slots, never = RequestSlots(24), asyncio.Event()

    async def call(tenant: str, until: asyncio.Event) -> None:
        async with slots.acquired(tenant, exclusive=False):
            await until.wait()

    slow = [asyncio.create_task(call("slow", never)) for _ in range(100)]
    await asyncio.sleep(0)
    assert slots.held == 16
    at_once = asyncio.Event()
    at_once.set()
    async with asyncio.timeout(30):
        await asyncio.gather(*(call("other", at_once) for _ in range(50)))
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert slots.held == 0
