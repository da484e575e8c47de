"""Limits of a policy: those that apply to a caller, and the buckets in which its calls count. Pure functions.

    caller ──applicable──> limits ──buckets_of(limit, caller, model)──> (limit, kind, tenant | tenant and key | model)

Requests a second are counted at the gateway, before a service has the call; a limit that depends on the model is
counted in the service that reads the model's name, as are bytes, rows and requests in flight. A bucket is one number of
one limit for one unit. coord divides it among the gateways and services that count in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, cast

from shoal.access.decision import Caller
from shoal.access.patterns import matches_any
from shoal.access.policy import ANY, Limit, Policy
from shoal.errors import InvalidArgument


class Kind(StrEnum):
    """Number of a limit."""

    REQUESTS = "requests"
    """Requests a second."""
    IN_FLIGHT = "in_flight"
    """Requests in flight."""
    BYTES = "bytes"
    """Bytes of requests a second."""
    ROWS = "rows"
    """Rows a second."""


@dataclass(frozen=True)
class Bucket:
    """One number of a limit for one unit. `tenant`, `key` and `model` are empty where the unit does not have them."""

    limit: str
    """Name of the limit."""
    kind: Kind
    tenant: str = ""
    key: str = ""
    """Id of a key or token. All tokens of a tenant that have no id count together."""
    model: str = ""


@dataclass(frozen=True)
class Amount:
    """Number of a limit, or a share of it."""

    amount: float
    """Units a second; for IN_FLIGHT, a whole number of requests."""
    burst: float = 0.0
    """Units at once after a pause; 0 for IN_FLIGHT."""


def amount_of(limit: Limit, kind: Kind) -> Amount | None:
    """Return the number of a kind of a limit; None when the limit has none."""
    if kind is Kind.IN_FLIGHT:
        return None if limit.requests_in_flight is None else Amount(float(limit.requests_in_flight))
    rate, burst = {
        Kind.REQUESTS: (limit.requests_per_second, limit.burst_requests),
        Kind.BYTES: (limit.bytes_per_second, limit.burst_bytes),
        Kind.ROWS: (limit.rows_per_second, limit.burst_rows),
    }[kind]
    return None if rate is None else Amount(rate, float(burst) if burst is not None else max(rate, 1.0))


def rate_limit_field(name: str, kind: Kind, number: float) -> str:
    """Return the value of `x-ratelimit-limit` for a limit's number, a second but for a number in flight.

    The form is that of Envoy's own rate limits: draft-polli-ratelimit-headers-03.
    """
    text = f"{number:.0f}" if number >= 1 else f"{number:g}"
    window = "" if kind is Kind.IN_FLIGHT else ";w=1"
    return f'{text}, {text}{window};name="{name}/{kind}"'


def depends_on_model(limit: Limit) -> bool:
    """Return True when a call counts by the name of its model."""
    return limit.per == "model" or ANY not in limit.models


def at_gateway(limit: Limit) -> bool:
    """Return True when the requests of a limit are counted at the gateway."""
    return limit.requests_per_second is not None and not depends_on_model(limit)


def in_services(limit: Limit) -> tuple[Kind, ...]:
    """Return the kinds of a limit that are counted in infer and ingest."""
    return tuple(
        kind
        for kind in Kind
        if amount_of(limit, kind) is not None and (kind is not Kind.REQUESTS or depends_on_model(limit))
    )


def applies(limit: Limit, *, tenant: str, role: str, subject: str) -> bool:
    """Return True when a limit holds for a caller, whatever the model."""
    of_caller: dict[CallerField, str] = {"tenant": tenant, "role": role, "subject": subject}
    return all(_names(limit, field).has(value) for field, value in of_caller.items())


def applicable(policy: Policy, caller: Caller | None) -> tuple[Limit, ...]:
    """Return the limits that hold for a caller; none for callers who are not verified, and for services."""
    if caller is None or not policy.limits:
        return ()
    return tuple(
        limit
        for limit in policy.limits
        if applies(limit, tenant=caller.tenant, role=caller.role, subject=caller.subject)
    )


def counts_model(limit: Limit, model: str) -> bool:
    """Return True when calls of a model count in a limit."""
    return matches_any(limit.models, model)


def described(limit: Limit) -> str:
    """Return a limit in words: its name, its numbers and their unit."""
    units = {
        Kind.REQUESTS: "requests a second",
        Kind.IN_FLIGHT: "requests in flight",
        Kind.BYTES: "bytes a second",
        Kind.ROWS: "rows a second",
    }
    numbers = [
        f"{amount.amount:.12g} {unit}" + (f" (burst {amount.burst:.12g})" if amount.burst else "")
        for kind, unit in units.items()
        if (amount := amount_of(limit, kind)) is not None
    ]
    return f"{limit.name!r}: {', '.join(numbers)} of each {limit.per}"


def bucket_of(limit: Limit, kind: Kind, caller: Caller, model: str = "") -> Bucket:
    """Return the bucket of a limit in which a call counts. The limit applies to the caller and the model."""
    if limit.per == "model":
        return Bucket(limit.name, kind, model=model)
    return Bucket(limit.name, kind, caller.tenant, caller.key if limit.per == "key" else "")


# -- requests at the gateway

LAYERS = 4
"""Limits of requests a second that may apply to one caller at the gateway. Each costs its calls 10 us of Envoy."""
CASES = 2_000
"""Cases of callers that the gateway's limits distinguish. Each takes about 1 kB of Envoy's configuration."""

CallerField = Literal["tenant", "role", "subject"]
_FIELDS: tuple[CallerField, ...] = ("tenant", "role", "subject")


@dataclass(frozen=True)
class Split:
    """Decision by one field of a caller: an entry for each named value, and one for all other values."""

    field: CallerField
    entries: Mapping[str, Case]
    otherwise: Case


Case = Limit | Split | None
"""Limit that holds, a decision by a further field, or no limit."""


def layers(limits: Iterable[Limit]) -> list[list[Limit]]:
    """Return the limits that are counted at the gateway, in layers: of a layer, at most one holds for a caller."""
    found: list[list[Limit]] = []
    for limit in filter(at_gateway, limits):
        free = (layer for layer in found if not any(_overlap(limit, other) for other in layer))
        layer = next(free, None)
        if layer is None:
            found.append([limit])
        else:
            layer.append(limit)
    return found


def case_of(layer: Sequence[Limit], *, tenant: str | None = None, role: str | None = None) -> Case:
    """Return the decision which limit of a layer holds for a caller; `tenant` and `role` are known, or are decided."""
    fixed = {"tenant": tenant, "role": role}
    known = {name: value for name, value in fixed.items() if value is not None}
    fields = tuple(name for name in _FIELDS if name not in known)
    for name, value in known.items():
        layer = [limit for limit in layer if _names(limit, cast(CallerField, name)).has(value)]
    return _case(layer, fields)


def _case(layer: Sequence[Limit], fields: Sequence[CallerField]) -> Case:
    if not layer or not fields:
        return layer[0] if layer else None
    field, *rest = fields
    names = [(limit, _names(limit, field)) for limit in layer]
    named = sorted({name for _, of_limit in names for name in of_limit.listed})
    otherwise = _case([limit for limit, of_limit in names if of_limit.is_any], rest)
    if not named:
        return otherwise
    entries = {name: _case([limit for limit, of_limit in names if of_limit.has(name)], rest) for name in named}
    return Split(field, entries, otherwise)


def check(limits: Sequence[Limit]) -> None:
    """Raise InvalidArgument when the limits of requests are too many for a gateway."""
    at = [limit for limit in limits if at_gateway(limit)]
    if (listed := sum(len(_names(limit, field).listed) for limit in at for field in _FIELDS)) > CASES:
        raise InvalidArgument(f"limits of requests a second list {listed} names, of at most {CASES}: use roles")
    found = layers(at)
    if len(found) > LAYERS:
        names = ", ".join(repr(layer[0].name) for layer in found)
        raise InvalidArgument(
            f"more than {LAYERS} limits of requests a second may hold for one caller, such as {names}: give them "
            "other tenants, roles or subjects, or except_tenants"
        )
    # Each field multiplies the cases: three lists of 1,000 names would be a billion.
    if (cases := sum(_most_cases(layer) for layer in found)) > CASES:
        raise InvalidArgument(f"limits of requests a second make up to {cases} cases, of at most {CASES}: use roles")


def _most_cases(layer: Sequence[Limit]) -> int:
    """Return a bound on the cases of a layer, without making them."""
    return math.prod(1 + len({name for limit in layer for name in _names(limit, field).listed}) for field in _FIELDS)


@dataclass(frozen=True)
class _Names:
    """Values of a field for which a limit holds: those of `listed`, or with `is_any` all others."""

    listed: frozenset[str]
    is_any: bool

    def has(self, name: str) -> bool:
        return (name in self.listed) is not self.is_any

    def overlap(self, other: _Names) -> bool:
        if self.is_any and other.is_any:
            return True
        if self.is_any or other.is_any:
            some, others = (other, self) if self.is_any else (self, other)
            return bool(some.listed - others.listed)
        return bool(self.listed & other.listed)


def _names(limit: Limit, field: CallerField) -> _Names:
    names: tuple[str, ...] = {"tenant": limit.tenants, "role": limit.roles, "subject": limit.subjects}[field]
    excepted = frozenset(limit.except_tenants if field == "tenant" else ())
    return _Names(excepted, True) if ANY in names else _Names(frozenset(names) - excepted, False)


def _overlap(one: Limit, other: Limit) -> bool:
    """Return True when both limits may hold for one caller."""
    return all(_names(one, field).overlap(_names(other, field)) for field in _FIELDS)
