"""Settings of a tenant, their validation, and the limits that follow from them. Pure values.

the tenant's setting ──not set──> the setting of `*` ──not set──> the default
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import datetime

from shoal.access.policy import TENANT_CHARS
from shoal.errors import InvalidArgument

EVERYONE = "*"
"""Name under which the settings of all tenants without their own are stored."""
_HOUR_S = 3_600


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """Settings of a tenant; None where a field is not set."""

    weight: float | None = None
    max_pending: int | None = None
    rate: float | None = None
    burst: float | None = None

    def set_values(self) -> dict[str, float]:
        """Return the set fields, by name."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}


NAMES = tuple(field.name for field in fields(TenantSettings))


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """Limits in force for a tenant. 0: no limit."""

    weight: float = 1.0
    max_pending: int = 0
    rate: float = 0.0
    """Submits per second."""
    burst: float = 0.0
    """Maximum submits at one time; at least 1 with a rate."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Tenant with settings."""

    name: str
    settings: TenantSettings
    updated_at: datetime


def in_force(own: TenantSettings | None, everyone: TenantSettings | None) -> TenantLimits:
    """Return the limits of a tenant with settings `own`, where `everyone` are the settings of `*`."""
    found = {**(everyone.set_values() if everyone else {}), **(own.set_values() if own else {})}
    rate = found.get("rate", 0.0)
    burst = min(found.get("burst", 0.0) or rate, rate * _HOUR_S)
    return TenantLimits(
        weight=found.get("weight", 1.0),
        max_pending=int(found.get("max_pending", 0)),
        rate=rate,
        burst=max(1.0, burst) if rate else 0.0,
    )


def checked_name(name: str) -> str:
    """Return a valid name of a tenant.

    Raises:
        InvalidArgument: the name is too long.
    """
    if len(name) > TENANT_CHARS:
        raise InvalidArgument(f"name: at most {TENANT_CHARS} characters, got {len(name)}")
    return name


_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "weight": (0.01, 100, False),
    "max_pending": (1, 1e9, True),
    "rate": (0.001, 1e6, True),
    "burst": (1, 1e6, True),
}
"""Minimum, maximum, and True where 0 (no limit) is valid too."""


def checked(settings: TenantSettings, inherit: Collection[str] = ()) -> TenantSettings:
    """Return valid settings.

    Raises:
        InvalidArgument: a field is invalid; the message names it, and what was expected and received.
    """
    for name, value in settings.set_values().items():
        least, most, has_zero = _RANGES[name]
        if not math.isfinite(value) or not (least <= value <= most or (has_zero and value == 0)):
            none = "0 (none), or " if has_zero else ""
            raise InvalidArgument(f"settings.{name}: {none}{least:g} to {most:g}, got {value:g}")
    for name in inherit:
        if name not in NAMES:
            raise InvalidArgument(f"inherit: {name[:40]!r} is none of {', '.join(NAMES)}")
        if name in settings.set_values():
            raise InvalidArgument(f"inherit: {name} is set in the same request")
    if not settings.set_values() and not inherit:
        raise InvalidArgument(f"settings: set at least one of {', '.join(NAMES)}")
    return settings
