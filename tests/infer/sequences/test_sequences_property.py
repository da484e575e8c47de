"""Any traffic: steps run in order and once, keep their rows, find the state that the step before left, or are refused.

The expected result of each step is worked out step by step by a plain reference, from what happened to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.sequences.sequence_table import SequenceTable
from shoal.errors import DeadlineExceeded, Internal, InvalidArgument
from tests.infer.scheduling.virtual_time import run
from tests.infer.sequences import simulated
from tests.infer.sequences.simulated import Bench, Ran, step
from tests.long_form import by_form

IDLE_S = 0.25


@dataclass(frozen=True)
class Sent:
    """A step that a test sends."""

    gap_s: float
    id: int
    start: bool
    end: bool
    is_poison: bool
    timeout_us: int
    cancel_s: float | None


@dataclass
class Told:
    """What became of it."""

    number: int
    sent: Sent
    arrived: float
    outcome: float | BaseException | None = None


SENT = st.builds(
    Sent,
    gap_s=st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.012, 0.05, 0.3]),
    id=st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5]),
    start=st.sampled_from([True, False, False]),
    end=st.sampled_from([True, False, False]),
    is_poison=st.sampled_from([False] * 6 + [True]),
    timeout_us=st.sampled_from([0, 0, 0, 4000, 15_000]),
    cancel_s=st.sampled_from([None] * 5 + [0.0, 0.004, 0.02]),
)


def crowded(seed: int) -> list[Sent]:
    """Many steps of few sequences: what strategies, which like small things, seldom come to."""
    of = Random(seed)
    return [
        Sent(
            gap_s=of.choice([0.0, 0.0, 0.001, 0.001, 0.012, 0.05, 0.3]),
            id=of.choice([1, 1, 1, 2, 2, 3, 4, 5]),
            start=of.random() < 0.3,
            end=of.random() < 0.2,
            is_poison=of.random() < 0.15,
            timeout_us=of.choice([0, 0, 0, 4000, 15_000]),
            cancel_s=of.choice([None] * 6 + [0.0, 0.004, 0.02]),
        )
        for _ in range(of.randint(5, 80))
    ]


async def traffic(bench: Bench, script: Sequence[Sent]) -> list[Told]:
    clock = asyncio.get_running_loop().time
    told: list[Told] = []
    tasks: list[asyncio.Task[None]] = []

    async def one(entry: Told) -> None:
        sent = entry.sent
        call = step(sent.id, entry.number, start=sent.start, end=sent.end, timeout_us=sent.timeout_us)
        try:
            entry.outcome = await bench.total(call)
        except (Exception, asyncio.CancelledError) as err:
            entry.outcome = err

    for n, sent in enumerate(script, 1):
        await asyncio.sleep(sent.gap_s)
        if sent.is_poison:
            bench.poison.add(float(n))
        told.append(Told(n, sent, clock()))
        tasks.append(asyncio.create_task(one(told[-1])))
        await asyncio.sleep(0)  # It arrives.
        check_heads(bench.scheduler.table)
        if sent.cancel_s is not None:
            asyncio.get_running_loop().call_later(sent.cancel_s, tasks[-1].cancel)
    await asyncio.wait(tasks)
    return told


def check_heads(table: SequenceTable) -> None:
    """What is remembered of who has a step to run is what looking at each sequence would find."""
    for instance, assigned in enumerate(table.assigned):
        found = {head for sequence in assigned if (head := sequence.head) is not None}
        heads = table.heads(instance)
        assert set(heads) == found
        assert len(heads) == len(found)


def check_rows(log: Sequence[Ran]) -> None:
    """One row for each sequence, and one sequence for each row, from its start to its end."""
    home: dict[int, tuple[int, int]] = {}
    owner: dict[tuple[int, int], int] = {}
    for ran in log:
        place = (ran.instance, ran.row)
        if ran.starts:
            home[ran.id], owner[place] = place, ran.id
        assert home.get(ran.id) == place, f"sequence {ran.id} moved"
        assert owner[place] == ran.id, f"row {place} has two owners"
        if ran.ends:
            del home[ran.id], owner[place]


def check_runs(log: Sequence[Ran], most: int) -> None:
    by_run: dict[tuple[int, int], list[int]] = {}
    for ran in log:
        by_run.setdefault((ran.instance, ran.run), []).append(ran.id)
    for ids in by_run.values():
        assert len(ids) == len(set(ids)) <= most, "a step ran beside another one of its sequence"


def check_sequence(told: Sequence[Told], log: Sequence[Ran]) -> None:
    """The steps with one id, in the order of their arrival, against a plain sum."""
    ran = {int(each.x): each for each in log}
    assert len(ran) == len(log), "a step ran twice"
    order = [int(each.x) for each in log]
    assert order == sorted(order), "steps overtook each other"
    total: float | None = None  # None: there is no sequence.
    for entry in told:
        outcome, sent = entry.outcome, entry.sent
        was_run = entry.number in ran
        if isinstance(outcome, InvalidArgument):
            assert "must specify the START flag" in outcome.message
            assert not was_run
            assert not sent.start
            assert total is None or may_be_idle(entry, told, log), f"step {entry.number} was refused"
            total = None
            continue
        if was_run and not sent.is_poison:
            assert sent.start or total is not None, f"step {entry.number} found a state that nobody left"
            total = (0.0 if sent.start else total or 0.0) + entry.number
            assert outcome == total or isinstance(outcome, asyncio.CancelledError)
        elif isinstance(outcome, Internal):
            assert sent.is_poison
        else:
            assert isinstance(outcome, DeadlineExceeded | asyncio.CancelledError), repr(outcome)
        failed = not was_run or sent.is_poison
        if sent.end or (sent.start and failed):
            total = None


def may_be_idle(entry: Told, told: Sequence[Told], log: Sequence[Ran]) -> bool:
    """Whether nothing of the sequence happened for so long before `entry` that it may be over."""
    last = max((each.arrived for each in told if each.number < entry.number), default=0.0)
    last = max([last, *(each.at for each in log if each.x < entry.number)])
    # Its last run, as the model has it, ended one run later.
    return entry.arrived - last >= IDLE_S - 0.021


@settings(max_examples=by_form(120, 400), deadline=None)
@given(
    script=st.lists(SENT, min_size=1, max_size=40) | st.integers(0, 2**32).map(crowded),
    direct=st.booleans(),
    slots=st.integers(1, 4),
    instances=st.integers(1, 2),
    delay_s=st.sampled_from([0.0, 0.03]),
    preserves_order=st.booleans(),
)
def test_any_sequence_traffic_matches_the_reference(script, direct, slots, instances, delay_s, preserves_order):
    async def scene() -> tuple[list[Told], Bench]:
        given = simulated.settings(
            direct=direct,
            slots=slots,
            rows=slots if direct else 2,
            idle_s=IDLE_S,
            delay_s=delay_s,
            utilization=0.75 if direct else 0.0,
            preserves_order=preserves_order and not direct,
        )
        bench = Bench(given, instances=instances)
        async with bench.scheduler:
            told = await traffic(bench, script)
            await asyncio.sleep(IDLE_S + 1)
            assert len(bench.scheduler.table) == 0, "a sequence was left"
            assert bench.scheduler.table.waiting == bench.scheduler.table.waiting_bytes == 0
        return told, bench

    told, bench = run(scene())
    assert all(entry.outcome is not None for entry in told)
    assert bench.statistics.expired_executed == 0
    if not any(sent.is_poison for sent in script):
        assert bench.statistics.bisections == 0, "a batch failed"
    check_runs(bench.log, slots if direct else 2)
    if direct:
        check_rows(bench.log)
    for id in {entry.sent.id for entry in told}:
        check_sequence([entry for entry in told if entry.sent.id == id], [ran for ran in bench.log if ran.id == id])
    succeeded = [entry for entry in told if isinstance(entry.outcome, float)]
    assert bench.statistics.success.count >= len(succeeded)


def test_the_reference_sees_a_lost_state():
    """The check can fail: a step executed as if it were the first."""
    sent = Sent(0, 1, False, False, False, 0, None)
    told = [Told(1, Sent(0, 1, True, False, False, 0, None), 0.0, 1.0), Told(2, sent, 0.0, 2.0)]
    log = [Ran(0.0, 0, 1, 0, 1, True, False, 1.0), Ran(0.1, 0, 2, 0, 1, False, False, 2.0)]
    try:
        check_sequence(told, log)
    except AssertionError:
        return
    raise AssertionError("it was not seen")
