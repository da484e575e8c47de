"""Decision about a job with dependencies: still waiting, due, or ended because a dependency did not succeed.

    waits for a, b ──a succeeded──> waits for b ──b succeeded──> due (not before its own `not_before`)
                   └──one ended otherwise, or was removed──> CANCELLED or FAILED, as its submit chose
                   └──its deadline passed──> EXPIRED

Each decision reads the states of all dependencies, so no decision depends on an event that could be missed.
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
"""States by reference. A missing reference names a job that never existed or was removed."""


def decide(job: Job, known: DependencyStates, instance: str, now: datetime) -> Job | End:
    """Return the end of a waiting job, or the job as it continues, which may be unchanged."""
    if (ended := imposed_end(job, now)) is not None:
        return ended
    for reference in job.waits_for:
        dependency = known.get(reference)
        if dependency is None or dependency.state in _FAILED:
            return _failed_end(job, reference, dependency)
    left = [known[reference] for reference in job.waits_for if known[reference].state is not State.SUCCEEDED]
    if not left:
        return unblocked(job, instance, now)
    # By id from now on, by which the cascade finds the dependents of an ended job.
    return job.replaced(waits_for=tuple(dict.fromkeys(dependency.id for dependency in left)))


def unmet(job: Job, known: DependencyStates) -> tuple[str, ...]:
    """Return the references to dependencies that have not succeeded, in the form of `depends_on`.

    A reference by key stays one: at a requeue, another job may have the key.
    """
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
        reason = f"it depends on a job {words(reference)} that no longer exists"
    else:
        reason = f"it depends on job {dependency.id}, which is {dependency.state}"
        reason += f": {dependency.message}" if dependency.message else ""
    reason = reason[:_REASON_CHARS]
    if job.fails_on_dependency:
        return End(Outcome.FAILED, Code.FAILED_PRECONDITION, reason)
    return End(Outcome.CANCELLED, Code.CANCELLED, f"cancelled: {reason}")
