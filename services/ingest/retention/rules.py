"""Retention rules of ended jobs, by tenant and state, and of batches, by tenant. Pure decisions.

the tenant's own rule for the state ──else──> the rule of `*` ──else──> the instance's configuration
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, TypeAlias

from services.ingest.job import FINAL, Job, State
from services.ingest.tenants.settings import EVERYONE
from shoal.access.policy import TENANT_CHARS
from shoal.errors import InvalidArgument

SHORTEST = timedelta(minutes=1)
"""Shortest retention: by then, waiting clients and dependent jobs have read the job's end."""
LONGEST = timedelta(days=36_500)

Keep: TypeAlias = timedelta | None
"""Retention from the end of a job or batch; None is for ever."""

BATCHES: Final = "batches"

What: TypeAlias = State | Literal["batches"]
"""Subject of a rule: jobs that ended in a state, or all ended batches."""


def what_of(name: str) -> What:
    """Return the subject with the stored `name`. Raises ValueError when there is none."""
    return BATCHES if name == BATCHES else State(name)


@dataclass(frozen=True, slots=True)
class Rule:
    """Retention of the jobs of `tenant` that ended in a state, or of its batches."""

    tenant: str
    what: What
    keep: Keep


@dataclass(frozen=True, slots=True)
class Rules:
    """All retention rules. `defaults` has every final state, and batches."""

    defaults: Mapping[What, Keep]
    own: Mapping[tuple[str, What], Keep] = field(default_factory=dict)

    def keep(self, tenant: str, what: What) -> Keep:
        """Return the retention that applies to a tenant."""
        for name in (tenant, EVERYONE):
            if (name, what) in self.own:
                return self.own[name, what]
        return self.defaults[what]

    def shortest(self, what: What) -> Keep:
        """Return the shortest retention of any tenant; None when all keep `what` for ever."""
        every = [keep for (_, of), keep in self.own.items() if of == what and keep is not None]
        if (general := self.keep(EVERYONE, what)) is not None:
            every.append(general)
        return min(every, default=None)

    def is_past_retention(self, tenant: str, what: What, ended_at: datetime, now: datetime) -> bool:
        """Return True when a job or batch that ended at `ended_at` is to be removed."""
        keep = self.keep(tenant, what)
        return keep is not None and now - ended_at > keep

    def is_expired(self, job: Job, now: datetime) -> bool:
        """Return True when a job has ended and is to be removed."""
        return job.is_final and self.is_past_retention(job.tenant, job.state, job.updated_at, now)


def checked(tenant: str, what: What | None, keep: Keep) -> Rule:
    """Return a valid rule.

    Raises:
        InvalidArgument: a field is invalid; the message names it.
    """
    if len(tenant) > TENANT_CHARS:
        raise InvalidArgument(f"tenant: at most {TENANT_CHARS} characters, got {len(tenant)}")
    if what is None or (what != BATCHES and what not in FINAL):
        raise InvalidArgument(
            f"state: expected a final state ({', '.join(sorted(FINAL))}), or batches instead, got {what}"
        )
    if keep is not None and not SHORTEST <= keep <= LONGEST:
        raise InvalidArgument(f"keep: from {SHORTEST} to {LONGEST.days} days, or for ever; got {keep}")
    return Rule(tenant, what, keep)
