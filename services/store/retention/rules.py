"""Retention rules, and the rule that applies to each tenant.

    RESULTS      the record is removed; a tombstone stays, so that its job can have no other result
    ANSWERS      the model's answer is removed, the record stays
    TOMBSTONES   the tombstone is removed; a later result of its job would count as its first

A tenant's own rule overrides the rule for all tenants. Without any rule, everything is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from services.store.limits import MAX_TENANT_CHARACTERS
from shoal.errors import InvalidArgument


class DataKind(StrEnum):
    """Kinds of data that rules apply to."""

    RESULTS = "results"
    ANSWERS = "answers"
    TOMBSTONES = "tombstones"


SHORTEST: Mapping[DataKind, timedelta] = {
    # The client that submitted the job must have time to fetch its result. And a younger result may still be
    # uncommitted, while the scan passes each time range once.
    DataKind.RESULTS: timedelta(minutes=1),
    DataKind.ANSWERS: timedelta(minutes=1),
    # An ingest that was down for longer, with an unfinished job, would run that job again.
    DataKind.TOMBSTONES: timedelta(days=1),
}
LONGEST = timedelta(days=36_500)


@dataclass(frozen=True)
class Rule:
    """Rule: the time for which one kind of data is kept."""

    kind: DataKind
    tenant: str | None
    """None: all tenants without a rule of their own. The empty string is a tenant like any other."""
    keep_for: timedelta | None
    """None: kept for ever."""
    updated_at: datetime | None = None

    @property
    def id(self) -> str:
        """Id of the rule: one for each kind and tenant."""
        return self.kind if self.tenant is None else f"{self.kind}/{self.tenant}"


@dataclass(frozen=True)
class RetentionScope:
    """Data to remove: everything of `tenant` that is older than `until`. None: of all tenants."""

    tenant: str | None
    until: datetime


@dataclass(frozen=True)
class RetentionPlan:
    """Removal times of one kind of data, by tenant."""

    default: datetime | None
    own: Mapping[str, datetime | None]
    """Times of tenants that have a rule of their own. None: their data is kept for ever."""

    @property
    def is_empty(self) -> bool:
        return self.default is None and not any(self.own.values())

    @property
    def is_one_for_all(self) -> bool:
        return not self.own

    def until(self, tenant: str) -> datetime | None:
        """Return the time before which a tenant's data is removed. None: nothing is removed."""
        return self.own.get(tenant, self.default)


def plan(rules: Iterable[Rule], kind: DataKind, now: datetime) -> RetentionPlan:
    """Return the plan for data of `kind` under `rules` at `now`."""
    until = {
        rule.tenant: now - rule.keep_for if rule.keep_for is not None else None for rule in rules if rule.kind is kind
    }
    default = until.pop(None, None)
    return RetentionPlan(default, {tenant: time for tenant, time in until.items() if tenant is not None})


def check_rule(rule: Rule) -> None:
    """Check that a rule is allowed.

    Raises:
        InvalidArgument: names the field and the reason.
    """
    if rule.tenant is not None and len(rule.tenant) > MAX_TENANT_CHARACTERS:
        raise InvalidArgument(f"rule.tenant: {MAX_TENANT_CHARACTERS} characters at most, got {len(rule.tenant)}")
    if rule.kind is DataKind.TOMBSTONES and rule.tenant is not None:
        raise InvalidArgument("rule.tenant: tombstones have no tenant: leave it out")
    if rule.keep_for is not None and not SHORTEST[rule.kind] <= rule.keep_for <= LONGEST:
        shortest = int(SHORTEST[rule.kind].total_seconds())
        raise InvalidArgument(
            f"rule.keep: expected {shortest} s to {LONGEST.days} days for {rule.kind}, or unset for ever; "
            f"got {rule.keep_for.total_seconds():.0f} s"
        )
