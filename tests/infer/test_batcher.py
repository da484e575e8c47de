"""The batching policy, as examples: it is a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.infer.batcher import BatchPolicy, Run, Wait, decide


@dataclass(frozen=True)
class Call:
    rows: int = 1
    arrived: float = 0.0
    size_bytes: int = 1


def lane(*rows: int, arrived: float = 0.0) -> list[Call]:
    return [Call(n, arrived) for n in rows]


NOW = BatchPolicy(max_rows=8, max_bytes=1000)
PATIENT = BatchPolicy(max_rows=8, max_bytes=1000, delay_s=1.0)
PREFERS = BatchPolicy(max_rows=8, max_bytes=1000, delay_s=1.0, preferred=frozenset({4, 6}))


@pytest.mark.parametrize(
    ("lanes", "now", "policy", "expected"),
    [
        ([], 0.0, NOW, Wait(None)),
        # Delay 0: what is there runs, at once.
        ([lane(1)], 0.0, NOW, Run(0, 1)),
        ([lane(1, 1, 1)], 0.0, NOW, Run(0, 3)),
        # Rows are counted, not calls.
        ([lane(3, 3, 3)], 0.0, NOW, Run(0, 2)),
        ([lane(8, 1)], 0.0, NOW, Run(0, 1)),
        ([lane(1, 8)], 0.0, NOW, Run(0, 1)),
        # Bytes are counted too; one call that is too large runs alone.
        ([[Call(size_bytes=600), Call(size_bytes=600)]], 0.0, NOW, Run(0, 1)),
        ([[Call(size_bytes=5000), Call()]], 0.0, NOW, Run(0, 1)),
        # The lane whose front has waited longest goes first.
        ([lane(1, arrived=2.0), lane(1, arrived=1.0)], 3.0, NOW, Run(1, 1)),
        # With a delay: not before it is over ...
        ([lane(1)], 0.5, PATIENT, Wait(1.0)),
        ([lane(1)], 1.0, PATIENT, Run(0, 1)),
        ([lane(1, arrived=2.0), lane(1, arrived=1.5)], 2.0, PATIENT, Wait(2.5)),
        # ... unless the batch is full, or the next call does not fit into it.
        ([lane(4, 4)], 0.1, PATIENT, Run(0, 2)),
        ([lane(4, 3, 2)], 0.1, PATIENT, Run(0, 2)),
        ([lane(1, arrived=0.0), lane(8, arrived=0.4)], 0.5, PATIENT, Run(1, 1)),
        # A preferred size is not worth waiting beyond; the largest that is there.
        ([lane(1, 1, 1)], 0.1, PREFERS, Wait(1.0)),
        ([lane(1, 1, 1, 1)], 0.1, PREFERS, Run(0, 4)),
        ([lane(1, 1, 1, 1, 1)], 0.1, PREFERS, Run(0, 4)),
        ([lane(2, 2, 2, 1)], 0.1, PREFERS, Run(0, 3)),
        ([lane(8, 1)], 0.1, PREFERS, Run(0, 1)),
        ([lane(1, 1, 1)], 1.0, PREFERS, Run(0, 3)),
    ],
)
def test_examples(lanes, now, policy, expected):
    assert decide(lanes, now, policy) == expected


calls = st.builds(Call, rows=st.integers(1, 9), arrived=st.floats(0, 10), size_bytes=st.integers(0, 1500))


@given(
    lanes=st.lists(
        st.lists(calls, min_size=1, max_size=12).map(lambda c: sorted(c, key=lambda x: x.arrived)), max_size=4
    ),
    now=st.floats(0, 20),
    delay=st.sampled_from([0.0, 0.5, 5.0]),
    preferred=st.frozensets(st.integers(1, 8), max_size=3),
)
def test_what_always_holds(lanes, now, delay, preferred):
    policy = BatchPolicy(max_rows=8, max_bytes=1000, delay_s=delay, preferred=preferred)
    decision = decide(lanes, now, policy)
    if isinstance(decision, Run):
        batch = lanes[decision.lane][: decision.count]
        assert batch
        assert len(batch) == 1 or sum(call.rows for call in batch) <= 8
        assert len(batch) == 1 or sum(call.size_bytes for call in batch) <= 1000
    elif decision.until is None:
        assert not lanes
    else:
        # Nothing is forgotten: at the time that it names, something runs.
        assert decision.until > now
        assert decision.until == min(group[0].arrived for group in lanes) + delay
        assert isinstance(decide(lanes, decision.until, policy), Run)
