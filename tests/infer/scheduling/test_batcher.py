"""The static batching policy, as examples: it is a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.infer.scheduling.batcher import BatchPolicy, Run, Wait, decide


@dataclass(frozen=True)
class Call:
    rows: int = 1
    due: float = math.inf


def front(*rows: int) -> list[Call]:
    return [Call(n) for n in rows]


PATIENT = BatchPolicy(max_rows=8, max_bytes=1000, delay_s=1.0)
PREFERS = BatchPolicy(max_rows=8, max_bytes=1000, delay_s=1.0, preferred=frozenset({4, 6}))
EAGER = BatchPolicy(max_rows=8, max_bytes=1000, preferred=frozenset({4}))


@pytest.mark.parametrize(
    ("calls", "is_full", "now", "policy", "expected"),
    [
        # With a delay: not before it is over ...
        (front(1), False, 0.5, PATIENT, Wait(1.0)),
        (front(1), False, 1.0, PATIENT, Run(1, "delay")),
        # ... unless the batch is full, in rows, or because the next call does not fit into it.
        (front(4, 4), False, 0.1, PATIENT, Run(2, "full")),
        (front(4, 3), True, 0.1, PATIENT, Run(2, "full")),
        # A preferred size is not worth waiting beyond; the largest that is there.
        (front(1, 1, 1), False, 0.1, PREFERS, Wait(1.0)),
        (front(1, 1, 1, 1), False, 0.1, PREFERS, Run(4, "preferred")),
        (front(1, 1, 1, 1, 1), False, 0.1, PREFERS, Run(4, "preferred")),
        (front(2, 2, 2, 1), False, 0.1, PREFERS, Run(3, "preferred")),
        (front(8), False, 0.1, PREFERS, Run(1, "full")),
        (front(1, 1, 1), False, 1.0, PREFERS, Run(3, "delay")),
        # Without a delay, preferred sizes only cut what is there.
        (front(1, 1, 1), False, 0.0, EAGER, Run(3, "delay")),
        (front(1, 1, 1, 1, 1), False, 0.0, EAGER, Run(4, "preferred")),
    ],
)
def test_examples(calls, is_full, now, policy, expected):
    assert decide(calls, 0.0, now, policy, is_full=is_full) == expected


@given(
    calls=st.lists(st.builds(Call, rows=st.integers(1, 9)), min_size=1, max_size=12),
    is_full=st.booleans(),
    oldest=st.floats(0, 10),
    waited=st.floats(0, 10),
    delay=st.sampled_from([0.0, 0.5, 5.0]),
    preferred=st.frozensets(st.integers(1, 8), max_size=3),
)
def test_any_decision_keeps_the_policys_bounds(calls, is_full, oldest, waited, delay, preferred):
    policy = BatchPolicy(max_rows=8, max_bytes=1000, delay_s=delay, preferred=preferred)
    now = oldest + waited
    decision = decide(calls, oldest, now, policy, is_full=is_full)
    if isinstance(decision, Run):
        assert 1 <= decision.count <= len(calls)
        if decision.fired == "preferred":
            assert sum(call.rows for call in calls[: decision.count]) in preferred
    else:
        # Nothing is forgotten: at the time that it names, something runs.
        assert now < decision.until == oldest + delay
        assert isinstance(decide(calls, oldest, decision.until, policy, is_full=is_full), Run)
