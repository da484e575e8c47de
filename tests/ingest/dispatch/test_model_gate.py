"""Models that nobody runs are left alone for a while."""

from __future__ import annotations

from datetime import timedelta

from services.ingest.dispatch.model_gate import FIRST_MS, LONGEST_MS, ModelGate
from tests.ingest.making import START


def after(ms: float):
    return START + timedelta(milliseconds=ms)


def test_pauses_double_and_end_when_one_passes() -> None:
    gate = ModelGate()
    gate.refused("m", START)
    gate.refused("m", after(1))  # One with the first.
    assert gate.closed(after(FIRST_MS - 1)) == ["m"]
    assert gate.closed(after(FIRST_MS)) == []
    gate.refused("m", after(FIRST_MS))
    assert gate.closed(after(FIRST_MS * 3 - 1)) == ["m"]
    gate.passed("m")
    assert gate.closed(after(FIRST_MS * 3 - 1)) == []
    gate.refused("m", START)
    assert gate.closed(after(FIRST_MS)) == []


def test_a_pause_has_an_end_however_long_nobody_is_there() -> None:
    gate = ModelGate()
    now = START
    for _ in range(50):
        gate.refused("m", now)
        now += timedelta(milliseconds=LONGEST_MS)
        assert gate.closed(now) == []


def test_retry_after_is_honoured_and_others_go_on() -> None:
    gate = ModelGate()
    gate.refused("m", START, retry_after_ms=10_000)
    assert gate.closed(after(9_999)) == ["m"]
    assert gate.closed(after(10_000)) == []


def test_it_remembers_only_so_many() -> None:
    gate = ModelGate()
    for n in range(1_000):
        gate.refused(f"m{n}", START)
    assert len(gate.closed(START)) == 100
