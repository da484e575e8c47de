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
from services.ingest.job import FINAL, End, Job, Outcome, State, imposed_end, unblocked
from services.ingest.job_store import DependencyState
from shoal.errors import Code

_REASON_CHARS = 500


DependencyStates: TypeAlias = Mapping[str, DependencyState]
"""By reference. One that is missing refers to no job (any more)."""


def decide(job: Job, known: DependencyStates, instance: str, now: datetime) -> Job | End:
    """What becomes of a job that waits: how it ends, or how it goes on (which may be as it was)."""
    if (ended := imposed_end(job, now)) is not None:
        return ended
    for reference in job.waits_for:
        dependency = known.get(reference)
        if dependency is None or dependency.state in _FAILED:
            return _failed_end(job, reference, dependency)
    left = [known[reference] for reference in job.waits_for if known[reference].state is not State.SUCCEEDED]
    if not left:
        return unblocked(job, instance, now)
    # By id from now on: that is what is looked for when one of them ends.
    return job.replaced(waits_for=tuple(dict.fromkeys(dependency.id for dependency in left)))


def unmet(job: Job, known: DependencyStates) -> tuple[str, ...]:
    """What it waits for that has not succeeded, as it named it: a key may be another job's when it is requeued."""
    left: list[str] = []
    for reference in job.waits_for:
        dependency = known.get(reference)
        if dependency is None:
            left.append(reference)
        elif dependency.state is not State.SUCCEEDED:
            named = by_key(dependency.key)
            left.append(named if named in job.depends_on else reference)
    return tuple(dict.fromkeys(left))


_FAILED = FINAL - {State.SUCCEEDED}


def _failed_end(job: Job, reference: str, dependency: DependencyState | None) -> End:
    if dependency is None:
        reason = f"it depends on a job {words(reference)} that is not there any more"
    else:
        reason = f"it depends on job {dependency.id}, which is {dependency.state}"
        reason += f": {dependency.message}" if dependency.message else ""
    reason = reason[:_REASON_CHARS]
    if job.fails_on_dependency:
        return End(Outcome.FAILED, Code.FAILED_PRECONDITION, reason)
    return End(Outcome.CANCELLED, Code.CANCELLED, f"cancelled: {reason}")
