"""What is in force for a tenant, and what may be set."""

from __future__ import annotations

import math

import pytest

from services.ingest.tenants.settings import Limits, Settings, checked, checked_name, in_force
from shoal.errors import InvalidArgument


def test_what_is_not_set_is_what_everyone_has() -> None:
    everyone = Settings(weight=2, max_pending=100, rate=5)
    assert in_force(None, None) == Limits(1.0, 0, 0.0, 0.0)
    assert in_force(None, everyone) == Limits(2, 100, 5, 5)
    assert in_force(Settings(weight=7), everyone) == Limits(7, 100, 5, 5)
    assert in_force(Settings(max_pending=0, rate=0), everyone) == Limits(2, 0, 0, 0)
    assert in_force(Settings(burst=50), everyone) == Limits(2, 100, 5, 50)


def test_a_burst_is_at_least_a_job_and_at_most_an_hours_worth() -> None:
    assert in_force(Settings(rate=0.1), None).burst == 1
    assert in_force(Settings(rate=0.1, burst=1e6), None).burst == 360
    assert in_force(Settings(burst=5), None) == Limits()


@pytest.mark.parametrize(
    ("settings", "inherit", "says"),
    [
        (Settings(), (), "settings: set at least one of weight, max_pending, rate, burst"),
        (Settings(weight=0), (), "settings.weight: 0.01 to 100, got 0"),
        (Settings(weight=math.nan), (), "settings.weight: .*, got nan"),
        (Settings(weight=math.inf), (), "settings.weight: .*, got inf"),
        (Settings(weight=-1), (), "settings.weight: .*, got -1"),
        (Settings(max_pending=-1), (), r"settings.max_pending: 0 \(none\), or 1 to 1e\+09, got -1"),
        (Settings(max_pending=2**62), (), "settings.max_pending: .*"),
        (Settings(rate=1e-9), (), r"settings.rate: 0 \(none\), or 0.001 to 1e\+06, got 1e-09"),
        (Settings(burst=0.5), (), "settings.burst: .*, got 0.5"),
        (Settings(weight=1), ("colour",), "inherit: 'colour' is none of weight"),
        (Settings(weight=1), ("weight",), "inherit: weight is set in the same request"),
        (Settings(), ("x" * 1_000_000,), "inherit: 'x{40}' is none of"),
    ],
)
def test_what_is_wrong_is_named(settings: Settings, inherit: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        checked(settings, inherit)


def test_names() -> None:
    assert checked_name("*" * 64) == "*" * 64
    with pytest.raises(InvalidArgument, match="name: at most 64 characters, got 65"):
        checked_name("t" * 65)
