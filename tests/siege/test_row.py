"""The goals of a row of the siege."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.siege.bystander import OK
from bench.siege.row import TENANTS, Latencies, Memory, Row, is_allowed

DRAIN_S = 6.5


def row(attack: str = "ping", own: str = "", others: str = "", **more: object) -> Row:
    errors = {name: Counter([outcome] if outcome else []) for name, outcome in zip(TENANTS, (own, others), strict=True)}
    met: dict[str, object] = {"tally": {"connections": 8, "frames": 100}, "quiet": Latencies(1.0, 2.0)}
    return Row(attack, "now", errors=errors, **{**met, **more})  # type: ignore[arg-type]


def test_a_row_without_errors_meets_every_goal():
    assert row().missed(DRAIN_S) == []


def test_an_attacker_that_sends_nothing_is_no_success():
    assert row(tally={"connections": 8, "connection ConnectionRefusedError": 8}).missed(DRAIN_S) == ["no attack"]


@pytest.mark.parametrize(
    ("attack", "outcome", "allowed"),
    [
        ("ping", "status 8 full", False),
        ("calls-2048", "status 8 full", True),
        ("calls-2048", "status 13 internal error", False),
        ("calls-2048", "wrong answer", False),
        ("calls-2048", "no response", False),
    ],
)
def test_a_bystander_may_be_refused_only_where_its_tenant_fills_the_queue(attack: str, outcome: str, allowed: bool):
    assert row(attack, own=outcome).missed(DRAIN_S) == ([] if allowed else ["errors"])
    assert row(attack, others=outcome).missed(DRAIN_S) == ["errors"]
    assert is_allowed(OK, [])


def test_late_responses_kept_memory_and_a_slow_stop_are_named():
    late = row(
        during=Latencies(1.0, 11.0),
        memory={"infer": Memory(100, 1200, 120)},
        is_alive=False,
        stop_s=None,
    )
    assert late.missed(DRAIN_S) == ["p99", "infer ceiling", "infer memory kept", "ended", "SIGTERM"]
