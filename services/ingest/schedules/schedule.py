"""A schedule, and what is to be done about it at a moment. Plain values and decisions.

next_at ──(time passes)──> due ──plan──> fire these times, skip those ──> next_at, further on
                             │
                             └─ paused: nothing is due; resumed, it goes on from then, less what was missed
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from services.ingest.limits import SCHEDULED
from services.ingest.schedules import cron

FIRED_AT_ONCE = 100
"""Of missed times that are made up for: so many in one go, then other schedules have their turn."""
GRACE = timedelta(seconds=60)
"""A time that is so late is on time: a leader that was killed is succeeded after a few seconds."""


class Misfire(StrEnum):
    """What is done about times at which nobody was there."""

    SKIP = "skip"
    LATEST = "latest"
    """One job, for the latest of them."""
    ALL = "all"
    """A job for each of them."""


class Overlap(StrEnum):
    """What is done when the job of the time before has not ended yet."""

    ALLOW = "allow"
    SKIP = "skip"
    CANCEL = "cancel"
    """The one before is cancelled."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A job that recurs. Times are UTC."""

    tenant: str
    name: str
    cron: str
    zone: str
    template: bytes
    """The SubmitRequest of each job, serialised, without a key."""
    created_at: datetime
    updated_at: datetime
    next_at: datetime | None
    """None while it is paused, or when no time comes any more."""
    misfire: Misfire = Misfire.SKIP
    overlap: Overlap = Overlap.ALLOW
    is_paused: bool = False
    revision: int = 1
    """Counts its changes by clients."""
    last_at: datetime | None = None
    last_job: str = ""
    fired: int = 0
    skipped: int = 0
    last_skip: str = ""
    """Why a time was skipped last."""

    def key_of(self, time: datetime) -> str:
        """The idempotency key of the job of that time: whoever fires it again finds the job that there is."""
        return f"{SCHEDULED}{self.name}:{label_of(time)}"

    def next_after(self, time: datetime) -> datetime | None:
        """Its first time after `time`."""
        return cron.next_after(self.cron, cron.zone_of(self.zone), time)


@dataclass(frozen=True, slots=True)
class SchedulePlan:
    """What is due: the times to fire, earliest first, and the one after them."""

    fire: tuple[datetime, ...]
    next_at: datetime | None
    skip: str = ""
    """Why others were skipped; empty: none were."""


def label_of(time: datetime) -> str:
    """A time as jobs carry it: 2026-12-24T18:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def plan(schedule: Schedule, now: datetime) -> SchedulePlan | None:
    """What is to be done about a schedule at `now`. None: nothing."""
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
        return SchedulePlan((), next_at, f"nobody was there at {label_of(last)}")
    return SchedulePlan((last,), next_at, f"nobody was there before {label_of(last)}" if last > due else "")
