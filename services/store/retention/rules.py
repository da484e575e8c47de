"""What is kept how long: plain rules, and which of them counts for whom.

    RESULTS      the whole record goes; a tombstone stays, so that its job can have no other result
    ANSWERS      the model's answer goes, the record stays
    TOMBSTONES   the tombstone goes: should anybody put a result of its job after so long, it would be the first

A tenant's own rule counts before the one for everybody; where there is neither, all is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from services.store.limits import MAX_TENANT_CHARACTERS
from shoal.errors import InvalidArgument


class Kept(StrEnum):
    """Kinds of things that are kept."""

    RESULTS = "results"
    ANSWERS = "answers"
    TOMBSTONES = "tombstones"


SHORTEST: Mapping[Kept, timedelta] = {
    # Whoever submitted the job must be able to fetch its result; and nothing younger may still be on its way into the
    # database, for an answer's removal goes by time and looks at none twice.
    Kept.RESULTS: timedelta(minutes=1),
    Kept.ANSWERS: timedelta(minutes=1),
    # An ingest that was down so long with a job in its hands would run it again.
    Kept.TOMBSTONES: timedelta(days=1),
}
LONGEST = timedelta(days=36_500)


@dataclass(frozen=True)
class Rule:
    """How long one kind of thing is kept."""

    kept: Kept
    tenant: str | None
    """None: everybody who has no rule of their own. The empty one is a tenant like any other."""
    keep: timedelta | None
    """None: for ever."""
    updated_at: datetime | None = None

    @property
    def id(self) -> str:
        """One rule for a kind and a tenant."""
        return self.kept if self.tenant is None else f"{self.kept}/{self.tenant}"


@dataclass(frozen=True)
class RetentionScope:
    """Whose things go that are older than `until`. Without a tenant: everybody's."""

    tenant: str | None
    until: datetime


@dataclass(frozen=True)
class RetentionPlan:
    """What the rules say of one kind of thing."""

    default: datetime | None
    own: Mapping[str, datetime | None]
    """Tenants that have a rule of their own. None: theirs are kept for ever."""

    @property
    def is_empty(self) -> bool:
        return self.default is None and not any(self.own.values())

    @property
    def is_one_for_all(self) -> bool:
        return not self.own

    def until(self, tenant: str) -> datetime | None:
        """What of a tenant is older goes. None: nothing does."""
        return self.own.get(tenant, self.default)


def plan(rules: Iterable[Rule], kept: Kept, now: datetime) -> RetentionPlan:
    """What `rules` say of `kept` at `now`."""
    until = {rule.tenant: now - rule.keep if rule.keep is not None else None for rule in rules if rule.kept is kept}
    default = until.pop(None, None)
    return RetentionPlan(default, {tenant: time for tenant, time in until.items() if tenant is not None})


def check_rule(rule: Rule) -> None:
    """Whether there may be such a rule.

    Raises:
        InvalidArgument: names what is wrong.
    """
    if rule.tenant is not None and len(rule.tenant) > MAX_TENANT_CHARACTERS:
        raise InvalidArgument(f"rule.tenant: {MAX_TENANT_CHARACTERS} characters at most, got {len(rule.tenant)}")
    if rule.kept is Kept.TOMBSTONES and rule.tenant is not None:
        raise InvalidArgument("rule.tenant: tombstones have no tenant: leave it out")
    if rule.keep is not None and not SHORTEST[rule.kept] <= rule.keep <= LONGEST:
        shortest = int(SHORTEST[rule.kept].total_seconds())
        raise InvalidArgument(
            f"rule.keep: expected {shortest} s to {LONGEST.days} days for {rule.kept}, or unset for ever; "
            f"got {rule.keep.total_seconds():.0f} s"
        )
