"""Conversion between jobs and the messages of shoal.ingest.v1."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from services.ingest.dependencies import references
from services.ingest.job import Job, State, generations
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

STATES = {state: f"JOB_STATE_{state.name}" for state in State}
S = TypeVar("S")
_STATE_OF = {pb.JobState.Value(name): state for state, name in STATES.items()}


def message_of(job: Job) -> pb.Job:
    """Return the message of a job."""
    message = pb.Job(
        id=job.id,
        state=STATES[job.state],
        model_name=job.model_name,
        model_version=job.model_version,
        tenant=job.tenant,
        idempotency_key=job.key,
        attempts=job.attempts,
        last_code=job.last_code,
        last_message=job.last_message,
        submitted_at=timestamp_of(job.submitted_at),
        updated_at=timestamp_of(job.updated_at),
        labels=dict(job.labels),
        keeps_request=job.keep_request,
        priority=job.priority,
        generation=job.generation,
        depends_on=map(references.message_of, job.depends_on),
        waits_for=map(references.message_of, job.waits_for),
        transitions=[
            pb.Transition(
                state=STATES[step.state],
                at=timestamp_of(step.at),
                attempt=step.attempt,
                instance=step.instance,
                reason=step.reason,
                generation=generation,
            )
            for step, generation in zip(job.transitions, generations(job), strict=True)
        ],
    )
    due_at = job.due_at or job.not_before
    if due_at is not None and due_at > job.submitted_at:
        message.not_before.CopyFrom(timestamp_of(due_at))
    if job.deadline is not None:
        message.deadline.CopyFrom(timestamp_of(job.deadline))
    return message


def state_of(number: int) -> State | None:
    """Return the job state that a filter names; None for 0, unspecified.

    Raises:
        InvalidArgument: `number` is not a state.
    """
    return filter_state("job", number, _STATE_OF)


def filter_state(kind: str, number: int, states: Mapping[int, S]) -> S | None:
    """Return the state in `states` that a filter names; None for 0, unspecified. `kind` names the states in the error.

    Raises:
        InvalidArgument: `number` is not in `states`.
    """
    if number == 0:
        return None
    if (state := states.get(number)) is None:
        raise InvalidArgument(f"state: not a {kind} state: {number}; expected 0 to {max(states)}")
    return state


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A Timestamp may hold the years 1 to 9999.
_EARLIEST_S, _LATEST_S = -62135596800, 253402300799


def moment_of(field: str, time: Timestamp) -> datetime:
    """Return the time of a timestamp, in whole milliseconds, rounded up.

    Raises:
        InvalidArgument: `time` is not a valid Timestamp; the message names `field`.
    """
    if not _EARLIEST_S <= time.seconds < _LATEST_S or not 0 <= time.nanos < 1_000_000_000:
        raise InvalidArgument(f"{field}: not a time in the years 1 to 9999 ({time.seconds} s and {time.nanos} ns)")
    return _EPOCH + timedelta(seconds=time.seconds, milliseconds=-(-time.nanos // 1_000_000))


def timestamp_of(moment: datetime) -> Timestamp:
    """Return the timestamp of an aware time."""
    seconds = int(moment.timestamp() // 1)
    return Timestamp(seconds=seconds, nanos=moment.microsecond * 1000)
