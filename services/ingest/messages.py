"""Jobs as shoal.ingest.v1 shows them."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from services.ingest.job import Job, State
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

_STATES = {state: f"JOB_STATE_{state.name}" for state in State}
_STATE_OF = {pb.JobState.Value(name): state for state, name in _STATES.items()}


def message_of(job: Job) -> pb.Job:
    """The message of a job."""
    message = pb.Job(
        id=job.id,
        state=_STATES[job.state],
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
        keeps_request=job.is_kept,
        priority=job.priority,
        transitions=[
            pb.Transition(
                state=_STATES[step.state],
                at=timestamp_of(step.at),
                attempt=step.attempt,
                instance=step.instance,
                reason=step.reason,
            )
            for step in job.transitions
        ],
    )
    if job.due_at is not None and job.due_at > job.submitted_at:
        message.not_before.CopyFrom(timestamp_of(job.due_at))
    if job.deadline is not None:
        message.deadline.CopyFrom(timestamp_of(job.deadline))
    return message


def state_of(number: int) -> State | None:
    """The state that a filter asks for; None for unspecified.

    Raises:
        InvalidArgument: the number is not a state.
    """
    if number == pb.JOB_STATE_UNSPECIFIED:
        return None
    if (state := _STATE_OF.get(number)) is None:
        raise InvalidArgument(f"state: not a job state: {number}; expected 0 to {max(_STATE_OF)}")
    return state


def timestamp_of(moment: datetime) -> Timestamp:
    """The timestamp of an aware time."""
    seconds = int(moment.timestamp() // 1)
    return Timestamp(seconds=seconds, nanos=moment.microsecond * 1000)
