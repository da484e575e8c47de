"""When a job that waits for others may run, and how it ends when one of them did not succeed. Plain decisions.

    waits for a, b ──a succeeded──> waits for b ──b succeeded──> due (not before its own time)
                   └──one ended otherwise, or is gone──> CANCELLED or FAILED, by its own choice
                   └──its deadline passed──> EXPIRED

What it waits for is looked up whole each time, so nothing depends on having seen the moment at which a job ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TypeAlias

from services.ingest.dependencies.references import by_key, words
from services.ingest.job import FINAL, End, Job, Outcome, State, ended_from_outside, released_from_waiting
from services.ingest.job_store import DependencyState
from shoal.errors import Code

_REASON_CHARS = 500


Known: TypeAlias = Mapping[str, DependencyState]
"""By reference. One that is missing refers to no job (any more)."""


def after_look(job: Job, known: Known, instance: str, now: datetime) -> Job | End:
    """What becomes of a job that waits: how it ends, or how it goes on (which may be as it was)."""
    if (ended := ended_from_outside(job, now)) is not None:
        return ended
    for reference in job.waits_for:
        standing = known.get(reference)
        if standing is None or standing.state in _FAILED:
            return _doom(job, reference, standing)
    left = [known[reference] for reference in job.waits_for if known[reference].state is not State.SUCCEEDED]
    if not left:
        return released_from_waiting(job, instance, now)
    # By id from now on: that is what is looked for when one of them ends.
    return job.but(waits_for=tuple(dict.fromkeys(standing.id for standing in left)))


def unmet(job: Job, known: Known) -> tuple[str, ...]:
    """What it waits for that has not succeeded, as it named it: a key may be another job's when it is requeued."""
    left: list[str] = []
    for reference in job.waits_for:
        standing = known.get(reference)
        if standing is None:
            left.append(reference)
        elif standing.state is not State.SUCCEEDED:
            named = by_key(standing.key)
            left.append(named if named in job.depends_on else reference)
    return tuple(dict.fromkeys(left))


_FAILED = FINAL - {State.SUCCEEDED}


def _doom(job: Job, reference: str, standing: DependencyState | None) -> End:
    if standing is None:
        reason = f"it depends on a job {words(reference)} that is not there any more"
    else:
        reason = f"it depends on job {standing.id}, which is {standing.state}"
        reason += f": {standing.message}" if standing.message else ""
    reason = reason[:_REASON_CHARS]
    if job.fails_with_them:
        return End(Outcome.FAILED, Code.FAILED_PRECONDITION, reason)
    return End(Outcome.CANCELLED, Code.CANCELLED, f"cancelled: {reason}")
