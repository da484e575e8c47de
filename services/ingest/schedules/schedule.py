"""Schedule of a recurring job, and the plan of its due times. Pure values and decisions.

next_at ──(time passes)──> due ──plan──> times to fire, times to skip ──> a later next_at
                             │
                             └─ paused: nothing is due; resumed, it continues from now without the missed times
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from services.ingest.limits import SCHEDULED
from services.ingest.schedules import cron

FIRED_AT_ONCE = 100
"""Maximum missed times that one plan fires, so that other schedules are not delayed."""
GRACE = timedelta(seconds=60)
"""Delay up to which a time counts as on time: a killed leader has a successor after a few seconds."""
_RETRY_FIRST = timedelta(seconds=1)
# Half of the grace: a time of a full queue is tried again before it is skipped.
_RETRY_MOST = GRACE / 2


class Misfire(StrEnum):
    """Policy for times that were missed because no leader ran."""

    SKIP = "skip"
    LATEST = "latest"
    """One job, for the latest missed time."""
    ALL = "all"
    """One job for each missed time."""


class Overlap(StrEnum):
    """Policy for a time at which the previous job has not ended."""

    ALLOW = "allow"
    SKIP = "skip"
    CANCEL = "cancel"
    """Cancel the previous job."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Recurring job. Times are UTC."""

    tenant: str
    name: str
    cron: str
    zone: str
    template: bytes
    """The serialised SubmitRequest of each job, without an idempotency key."""
    created_at: datetime
    updated_at: datetime
    next_at: datetime | None
    """Next time to fire; None while paused, or when there is no further time."""
    misfire: Misfire = Misfire.SKIP
    overlap: Overlap = Overlap.ALLOW
    is_paused: bool = False
    revision: int = 1
    """Number of changes by clients."""
    last_at: datetime | None = None
    last_job: str = ""
    fired: int = 0
    skipped: int = 0
    last_skip: str = ""
    """Reason of the last skip."""
    caller: bytes = b""
    """The verified caller that stored the schedule, for whom its jobs run; empty without a policy."""
    tries: int = 0
    """Number of attempts to fire that have failed since the last success."""

    def key_of(self, time: datetime) -> str:
        """Return the idempotency key of a time's job: firing the time again finds the existing job."""
        return f"{SCHEDULED}{self.name}:{label_of(time)}"

    def next_after(self, time: datetime) -> datetime | None:
        """Return the first time after `time`; None when there is none."""
        return cron.next_after(self.cron, cron.zone_of(self.zone), time)


@dataclass(frozen=True, slots=True)
class SchedulePlan:
    """Due times to fire, earliest first, and the next time after them."""

    fire: tuple[datetime, ...]
    next_at: datetime | None
    skip: str = ""
    """Reason why other times were skipped; empty: none were."""


def label_of(time: datetime) -> str:
    """Return a time as a job's label: 2026-12-24T18:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def retry_delay(tries: int) -> timedelta:
    """Return the pause after a number of failed attempts in a row: 1 s, 2 s, 4 s and so on, up to 30 s."""
    return min(_RETRY_MOST, _RETRY_FIRST * (1 << min(tries - 1, 10)))


def plan(schedule: Schedule, now: datetime) -> SchedulePlan | None:
    """Return the plan for a schedule at `now`; None when no time is due."""
    due = schedule.next_at
    if due is None or due > now:
        return None
    zone = cron.zone_of(schedule.zone)
    if schedule.misfire is Misfire.ALL:
        times = cron.between(schedule.cron, zone, due, now, FIRED_AT_ONCE)
        return SchedulePlan(tuple(times), schedule.next_after(times[-1] if times else now))
    last = cron.latest(schedule.cron, zone, due, now) or due
    next_at = schedule.next_after(max(last, now))
    if schedule.misfire is Misfire.SKIP and now - last > GRACE:
        reason = "it could not be fired" if schedule.tries else "no leader ran"
        return SchedulePlan((), next_at, f"{reason} at {label_of(last)}")
    return SchedulePlan((last,), next_at, f"no leader ran before {label_of(last)}" if last > due else "")
