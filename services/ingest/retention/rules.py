"""How long jobs stay that have ended: by tenant and state, plain decisions.

the tenant's own rule for the state ──else──> the rule of `*` ──else──> the instance's setting
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeAlias

from services.ingest.intake.submission import TENANT_CHARS
from services.ingest.job import FINAL, Job, State
from services.ingest.tenants.settings import EVERYONE
from shoal.errors import InvalidArgument

SHORTEST = timedelta(minutes=1)
"""Whoever waits for a job's end sees it by then, and so do the jobs that depend on it."""
LONGEST = timedelta(days=36_500)

Keep: TypeAlias = timedelta | None
"""So long after its end; None is for ever."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Jobs of `tenant` that ended as `state` stay so long."""

    tenant: str
    state: State
    keep: Keep


@dataclass(frozen=True, slots=True)
class Rules:
    """All of them. `defaults` has every final state."""

    defaults: Mapping[State, Keep]
    own: Mapping[tuple[str, State], Keep] = field(default_factory=dict)

    def keep(self, tenant: str, state: State) -> Keep:
        """How long a job stays that has ended so."""
        for whose in (tenant, EVERYONE):
            if (whose, state) in self.own:
                return self.own[whose, state]
        return self.defaults[state]

    def shortest(self, state: State) -> Keep:
        """No job that ended so goes sooner. None: none goes ever."""
        every = [keep for (_, of), keep in self.own.items() if of is state and keep is not None]
        if (general := self.keep(EVERYONE, state)) is not None:
            every.append(general)
        return min(every, default=None)

    def is_over(self, job: Job, now: datetime) -> bool:
        """Whether a job that has ended is to go."""
        if not job.is_final:
            return False
        keep = self.keep(job.tenant, job.state)
        return keep is not None and now - job.updated_at > keep


def checked(tenant: str, state: State | None, keep: Keep) -> Rule:
    """A rule, or InvalidArgument."""
    if len(tenant) > TENANT_CHARS:
        raise InvalidArgument(f"tenant: at most {TENANT_CHARS} characters, got {len(tenant)}")
    if state not in FINAL:
        raise InvalidArgument(f"state: expected one that jobs end in ({', '.join(sorted(FINAL))}), got {state}")
    if keep is not None and not SHORTEST <= keep <= LONGEST:
        raise InvalidArgument(f"keep: from {SHORTEST} to {LONGEST.days} days, or for ever; got {keep}")
    return Rule(tenant, state, keep)
