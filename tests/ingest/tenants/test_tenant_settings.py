"""What is in force for a tenant, and what may be set."""

from __future__ import annotations

import math

import pytest

from services.ingest.tenants.settings import TenantLimits, TenantSettings, checked, checked_name, in_force
from shoal.errors import InvalidArgument


def test_what_is_not_set_is_what_everyone_has() -> None:
    everyone = TenantSettings(weight=2, max_pending=100, rate=5)
    assert in_force(None, None) == TenantLimits(1.0, 0, 0.0, 0.0)
    assert in_force(None, everyone) == TenantLimits(2, 100, 5, 5)
    assert in_force(TenantSettings(weight=7), everyone) == TenantLimits(7, 100, 5, 5)
    assert in_force(TenantSettings(max_pending=0, rate=0), everyone) == TenantLimits(2, 0, 0, 0)
    assert in_force(TenantSettings(burst=50), everyone) == TenantLimits(2, 100, 5, 50)


def test_a_burst_is_at_least_a_job_and_at_most_an_hours_worth() -> None:
    assert in_force(TenantSettings(rate=0.1), None).burst == 1
    assert in_force(TenantSettings(rate=0.1, burst=1e6), None).burst == 360
    assert in_force(TenantSettings(burst=5), None) == TenantLimits()


@pytest.mark.parametrize(
    ("settings", "inherit", "says"),
    [
        (TenantSettings(), (), "settings: set at least one of weight, max_pending, rate, burst"),
        (TenantSettings(weight=0), (), "settings.weight: 0.01 to 100, got 0"),
        (TenantSettings(weight=math.nan), (), "settings.weight: .*, got nan"),
        (TenantSettings(weight=math.inf), (), "settings.weight: .*, got inf"),
        (TenantSettings(weight=-1), (), "settings.weight: .*, got -1"),
        (TenantSettings(max_pending=-1), (), r"settings.max_pending: 0 \(none\), or 1 to 1e\+09, got -1"),
        (TenantSettings(max_pending=2**62), (), "settings.max_pending: .*"),
        (TenantSettings(rate=1e-9), (), r"settings.rate: 0 \(none\), or 0.001 to 1e\+06, got 1e-09"),
        (TenantSettings(burst=0.5), (), "settings.burst: .*, got 0.5"),
        (TenantSettings(weight=1), ("colour",), "inherit: 'colour' is none of weight"),
        (TenantSettings(weight=1), ("weight",), "inherit: weight is set in the same request"),
        (TenantSettings(), ("x" * 1_000_000,), "inherit: 'x{40}' is none of"),
    ],
)
def test_what_is_wrong_is_named(settings: TenantSettings, inherit: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        checked(settings, inherit)


def test_names() -> None:
    assert checked_name("*" * 64) == "*" * 64
    with pytest.raises(InvalidArgument, match="name: at most 64 characters, got 65"):
        checked_name("t" * 65)
