"""Lines of a model process's output: whole, split, and dropped beyond a budget."""

from __future__ import annotations

from services.infer.model_process.output_lines import BURST, RATE, OutputLines
from tests.clocks import Seconds


def test_lines_are_whole_however_they_arrive():
    lines = OutputLines(Seconds())
    assert lines.add(b"one\ntw") == ["one"]
    assert lines.add(b"o\n\n  \nthree") == ["two"]
    assert lines.add(b"") == ["three"]
    assert lines.add(b"") == []


def test_a_line_without_end_is_split():
    lines = OutputLines(Seconds())
    found = [text for _ in range(5) for text in lines.add(b"x" * 9_000)] + lines.add(b"")
    assert sum(map(len, found)) == 45_000
    assert max(map(len, found)) <= 8_192


def test_lines_beyond_the_budget_are_dropped_and_reported_each_second():
    clock = Seconds()
    lines = OutputLines(clock)
    assert len(lines.add(b"x\n" * (BURST + 7))) == BURST
    assert lines.is_over_budget
    assert [text[:17] for text in lines.add(b"x\n" * 5)] == ["… dropped 7 lines"]
    clock.now += 0.5
    assert len(lines.add(b"x\n" * 1_000)) == RATE // 2
    clock.now += 0.5
    report, *more = lines.add(b"x\n" * 1_000)
    assert report.startswith(f"… dropped {5 + 1_000 - RATE // 2} lines")
    assert len(more) == RATE // 2


def test_the_last_lines_are_reported_at_the_end():
    lines = OutputLines(Seconds())
    lines.add(b"x\n" * (BURST + 9))
    assert [text[:17] for text in lines.add(b"")] == ["… dropped 9 lines"]
    assert not lines.is_over_budget
