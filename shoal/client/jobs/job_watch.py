"""Watching many jobs: what is told, and how to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.client.jobs.job import Job, JobState, to_state
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest


@dataclass(frozen=True)
class JobChange:
    """A transition of one of the jobs that are watched."""

    job: Job
    """As it was after the transition, which is the last of its `transitions`."""
    resume_token: str
    """Keep it, and give it to the next watch with the same filter: that one goes on after this."""
    existing: bool = False
    """No transition: the job was there when the watch began, and is told as it stood."""


@dataclass(frozen=True)
class JobFilter:
    """Which jobs; each that is set narrows."""

    ids: Sequence[str] = ()
    states: Sequence[JobState | str] = ()
    """Only transitions into these."""
    model: str = ""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def to_watch(wanted: JobFilter, *, tenant: str, include_existing: bool, resume_token: str) -> ingest.WatchJobsRequest:
    """The message. Raises InvalidArgument for a state that there is not."""
    try:
        states = [to_state(state) for state in wanted.states]
    except ValueError as err:
        known = ", ".join(each for each in JobState if each is not JobState.UNKNOWN)
        raise InvalidArgument(f"states: {err}: use some of {known}") from None
    return ingest.WatchJobsRequest(
        ids=wanted.ids,
        states=states,
        model_name=wanted.model,
        tenant=wanted.tenant or tenant,
        labels=dict(wanted.labels),
        include_existing=include_existing,
        resume_token=resume_token,
    )
