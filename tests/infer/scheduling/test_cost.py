"""The cost curve: what it makes of what it sees."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.infer.scheduling.cost import Backlog, CostCurve, size_bucket


def learnt(*samples: tuple[int, float], times: int = 20) -> CostCurve:
    curve = CostCurve()
    for _ in range(times):
        for rows, seconds in samples:
            curve.add(rows, seconds)
    return curve


def test_cost_is_linear_between_samples_and_proportional_beyond():
    curve = learnt((1, 0.001), (8, 0.002), (32, 0.005))
    assert curve.expected(1) == pytest.approx(0.001)
    assert curve.expected(20) == pytest.approx(0.0035)
    assert curve.expected(64) == pytest.approx(0.010)
    assert curve.expected(9) - curve.expected(8) == pytest.approx(0.003 / 24)
    assert curve.mean_of(2) is None


def test_costs_are_unknown_at_first():
    curve = CostCurve()
    assert not curve.is_known
    assert curve.expected(5) == curve.worst(5) == 0.0


def test_one_outlier_changes_little_and_a_lasting_change_is_learned_soon():
    curve = learnt((4, 0.001))
    curve.add(4, 10.0)
    assert curve.expected(4) < 0.0013
    for _ in range(40):
        curve.add(4, 0.004)
    assert curve.expected(4) > 0.0035


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(1e-6, 10.0)), min_size=1, max_size=60))
def test_cost_never_falls_and_worst_is_at_least_expected(samples):
    curve = CostCurve()
    for rows, seconds in samples:
        curve.add(rows, seconds)
    expected = [curve.expected(rows) for rows in range(1, 257)]
    worst = [curve.worst(rows) for rows in range(1, 257)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(expected))
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(worst))
    assert all(a <= b * (1 + 1e-9) for a, b in zip(expected, worst, strict=True))


def test_buckets_are_few_and_in_order():
    buckets = [size_bucket(rows) for rows in range(1, 65537)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) < 64


def test_a_backlog_measures_the_seconds_of_rows_and_batches():
    backlog = Backlog()
    assert backlog.row_s == 0.0
    for _ in range(8):
        backlog.add(4, 0.008)
    assert backlog.is_known
    assert (backlog.batch_s, backlog.row_s) == (pytest.approx(0.008), pytest.approx(0.002))
