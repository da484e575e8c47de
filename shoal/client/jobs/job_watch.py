"""Changes, filters and the request of a watch of many jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.client.jobs.job import Job, JobState, to_state
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest


@dataclass(frozen=True)
class JobChange:
    """A transition of one watched job."""

    job: Job
    """The job after the transition, which is the last of its `transitions`."""
    resume_token: str
    """Token for another watch with the same filter, which then continues after this change."""
    existing: bool = False
    """True when there was no transition: the job existed when the watch began."""


@dataclass(frozen=True)
class JobFilter:
    """Filter of a watch; each field that is set narrows the selection."""

    ids: Sequence[str] = ()
    states: Sequence[JobState | str] = ()
    """Only transitions into these states."""
    model: str = ""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def to_watch(filter: JobFilter, *, tenant: str, include_existing: bool, resume_token: str) -> ingest.WatchJobsRequest:
    """Return the message of a watch. Raises InvalidArgument for an unknown state."""
    try:
        states = [to_state(state) for state in filter.states]
    except ValueError as err:
        known = ", ".join(each for each in JobState if each is not JobState.UNKNOWN)
        raise InvalidArgument(f"states: {err}: use some of {known}") from None
    return ingest.WatchJobsRequest(
        ids=filter.ids,
        states=states,
        model_name=filter.model,
        tenant=filter.tenant or tenant,
        labels=dict(filter.labels),
        include_existing=include_existing,
        resume_token=resume_token,
    )
