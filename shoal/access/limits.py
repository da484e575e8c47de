"""Limits of a policy: those that apply to a caller, and the buckets in which its calls count. Pure functions.

    caller ──applicable──> limits ──buckets_of(limit, caller, model)──> (limit, kind, tenant | tenant and key | model)

Requests a second are counted at the gateway, before a service has the call; a limit that depends on the model is
counted in the service that reads the model's name, as are bytes, rows and requests in flight. A bucket is one number of
one limit for one unit. coord divides it among the gateways and services that count in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from shoal.access.decision import Caller
from shoal.access.patterns import matches_any
from shoal.access.policy import ANY, Limit, Policy


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
    return (
        _has(limit.tenants, tenant)
        and tenant not in limit.except_tenants
        and _has(limit.roles, role)
        and _has(limit.subjects, subject)
    )


def applicable(policy: Policy, caller: Caller | None) -> tuple[Limit, ...]:
    """Return the limits that hold for a caller; none for callers who are not verified, and for services."""
    if caller is None or not policy.limits:
        return ()
    return tuple(
        limit
        for limit in policy.limits
        if applies(limit, tenant=caller.tenant, role=caller.role, subject=caller.subject)
    )


def bucket_of(limit: Limit, kind: Kind, caller: Caller, model: str = "") -> Bucket:
    """Return the bucket of a limit in which a call counts. The limit applies to the caller and the model."""
    if limit.per == "model":
        return Bucket(limit.name, kind, model=model)
    return Bucket(limit.name, kind, caller.tenant, caller.key if limit.per == "key" else "")


def buckets_in_services(limits: Iterable[Limit], caller: Caller, model: str) -> tuple[Bucket, ...]:
    """Return the buckets in which infer or ingest counts a call of a model, by the limits that apply to its caller."""
    return tuple(
        bucket_of(limit, kind, caller, model)
        for limit in limits
        if matches_any(limit.models, model)
        for kind in in_services(limit)
    )


def _has(names: tuple[str, ...], name: str) -> bool:
    return name in names or ANY in names
