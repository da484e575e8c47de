"""How long jobs stay that have ended, by tenant and state, and batches, by tenant: plain decisions.

the tenant's own rule for the state ──else──> the rule of `*` ──else──> the instance's setting
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, TypeAlias

from services.ingest.job import FINAL, Job, State
from services.ingest.limits import TENANT_CHARS
from services.ingest.tenants.settings import EVERYONE
from shoal.errors import InvalidArgument

SHORTEST = timedelta(minutes=1)
"""Whoever waits for a job's end sees it by then, and so do the jobs that depend on it."""
LONGEST = timedelta(days=36_500)

Keep: TypeAlias = timedelta | None
"""So long after its end; None is for ever."""

BATCHES: Final = "batches"

What: TypeAlias = State | Literal["batches"]
"""What a rule is for: jobs that ended in a state, or batches, however they ended."""


def what_of(name: str) -> What:
    """By its name, in a document. Raises ValueError when it is none."""
    return BATCHES if name == BATCHES else State(name)


@dataclass(frozen=True, slots=True)
class Rule:
    """So long stay jobs of `tenant` that ended in a state, or its batches."""

    tenant: str
    what: What
    keep: Keep


@dataclass(frozen=True, slots=True)
class Rules:
    """All of them. `defaults` has every final state, and batches."""

    defaults: Mapping[What, Keep]
    own: Mapping[tuple[str, What], Keep] = field(default_factory=dict)

    def keep(self, tenant: str, what: What) -> Keep:
        """How long it stays, when it is a tenant's."""
        for whose in (tenant, EVERYONE):
            if (whose, what) in self.own:
                return self.own[whose, what]
        return self.defaults[what]

    def shortest(self, what: What) -> Keep:
        """Nobody's goes sooner. None: none goes ever."""
        every = [keep for (_, of), keep in self.own.items() if of == what and keep is not None]
        if (general := self.keep(EVERYONE, what)) is not None:
            every.append(general)
        return min(every, default=None)

    def is_past_retention(self, tenant: str, what: What, ended_at: datetime, now: datetime) -> bool:
        """Whether what ended then is to go."""
        keep = self.keep(tenant, what)
        return keep is not None and now - ended_at > keep

    def is_expired(self, job: Job, now: datetime) -> bool:
        """Whether a job that has ended is to go."""
        return job.is_final and self.is_past_retention(job.tenant, job.state, job.updated_at, now)


def checked(tenant: str, what: What | None, keep: Keep) -> Rule:
    """A rule, or InvalidArgument."""
    if len(tenant) > TENANT_CHARS:
        raise InvalidArgument(f"tenant: at most {TENANT_CHARS} characters, got {len(tenant)}")
    if what is None or (what != BATCHES and what not in FINAL):
        raise InvalidArgument(
            f"state: expected one that jobs end in ({', '.join(sorted(FINAL))}), or batches instead, got {what}"
        )
    if keep is not None and not SHORTEST <= keep <= LONGEST:
        raise InvalidArgument(f"keep: from {SHORTEST} to {LONGEST.days} days, or for ever; got {keep}")
    return Rule(tenant, what, keep)
