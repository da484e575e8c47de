"""Job: request, state and history."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from google.protobuf.duration_pb2 import Duration

from shoal.client.inference.inference import InferRequest, InferResult
from shoal.client.models.registry import of_time
from shoal.errors import Code, InvalidArgument, ShoalError
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2 as ingest


class JobState(StrEnum):
    """State of a job; QUEUED and RUNNING are the states of a job that has not ended."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The request is at fault: a retry cannot help."""
    DEAD = "dead"
    """Out of attempts."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """The deadline passed."""
    UNKNOWN = "unknown"
    """A state that this version of the client does not know."""

    @property
    def ended(self) -> bool:
        """True for final states."""
        return self not in (JobState.QUEUED, JobState.RUNNING, JobState.UNKNOWN)


@dataclass(frozen=True)
class JobRetry:
    """Retry policy of a job, applied by the node."""

    max_attempts: int = 5
    """Total number of attempts, 1 to 100."""
    initial_backoff_s: float = 0.2
    """Wait before the second attempt; it doubles for each further attempt, with full jitter."""
    max_backoff_s: float = 30.0
    codes: Collection[Code | str] = ()
    """Status codes to retry, `Code.UNAVAILABLE` or "unavailable"; any other code fails the job immediately.
    Empty: retry every code except those that put the request at fault."""
    attempt_timeout_s: float | None = None
    """Longest time of one attempt, at most an hour. None: the node's setting, a minute."""


@dataclass(frozen=True)
class JobRequest(InferRequest):
    """Request to a model, run as a durable job."""

    idempotency_key: str = ""
    """A second job with the same key returns the first job. Empty: the client makes a key, so that retries are safe."""
    tenant: str = ""
    deadline: float | timedelta | None = None
    """Seconds after acceptance at which a job without an answer expires."""
    retry: JobRetry | None = None
    """None: the node's default policy."""
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    """-9 to 9: order among the tenant's own jobs. One level is worth a minute of waiting."""
    keep_request: bool = False
    """True: the node keeps the inputs after the end, for `shoal models quantize` or a run on another version."""
    not_before: datetime | None = None
    """Earliest time of the first attempt. A time without a zone is local time."""
    delay: float | timedelta | None = None
    """Seconds between acceptance and the earliest first attempt. Excludes `not_before`."""
    depends_on: Sequence[str] = ()
    """Ids of jobs that must succeed first."""
    depends_on_keys: Sequence[str] = ()
    """Idempotency keys of jobs that must succeed first: jobs of the same tenant, accepted or earlier in the stream."""
    fails_with_dependencies: bool = False
    """True: the job fails (and can be requeued) when a dependency does not succeed. False: it is cancelled."""


@dataclass(frozen=True)
class Transition:
    """One transition of a job."""

    state: JobState
    at: datetime | None
    attempt: int
    """Number of the attempt, from 1; 0 before the first."""
    instance: str
    """The ingest instance that made the transition."""
    reason: str
    generation: int = 1


@dataclass(frozen=True)
class Job:
    """Snapshot of a job at the time of the call."""

    id: str
    state: JobState
    model_name: str
    model_version: str
    tenant: str = ""
    idempotency_key: str = ""
    attempts: int = 0
    """Attempts started so far."""
    last_code: int = 0
    """gRPC status code of the last failed attempt; `last_message` is its message."""
    last_message: str = ""
    submitted_at: datetime | None = None
    updated_at: datetime | None = None
    not_before: datetime | None = None
    """Earliest time of the next attempt, from the request or from backoff."""
    deadline: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    transitions: tuple[Transition, ...] = ()
    """All transitions so far, oldest first."""
    keeps_request: bool = False
    """True when the inputs are kept after the end."""
    priority: int = 0
    """Priority at the submit."""
    generation: int = 1
    """Number of lives of the job: 1, plus one for each requeue as a dead letter."""
    waits_for: tuple[str, ...] = ()
    """Dependencies that have not succeeded yet: ids, or `key:` and an idempotency key."""

    @property
    def ended(self) -> bool:
        """True in a final state."""
        return self.state.ended


@dataclass(frozen=True)
class Submitted:
    """Acknowledgement of one job of a stream."""

    index: int
    """Position of the job in the order of submission, from 0."""
    job_id: str = ""
    """Set when the job is durable."""
    existed: bool = False
    """True when the idempotency key belongs to an earlier job, which `job_id` names."""
    error: ShoalError | None = None
    """Reason of a rejection."""


@dataclass(frozen=True)
class Ran:
    """Result of one job of a stream."""

    index: int
    """Position of the job in the order of submission, from 0."""
    job_id: str = ""
    """Empty when the node rejected the job."""
    result: InferResult | None = None
    error: ShoalError | None = None
    """Reason of a missing result: the job was rejected, failed, was cancelled or expired."""


def to_submit(job: JobRequest, request: oip.ModelInferRequest, *, key: str, tenant: str) -> ingest.SubmitRequest:
    """Return the message of `job`, whose inference request is `request`."""
    message = ingest.SubmitRequest(
        request=request,
        idempotency_key=key,
        tenant=job.tenant or tenant,
        labels=dict(job.labels),
        keep_request=job.keep_request,
        priority=job.priority,
    )
    if job.retry is not None:
        message.retry.CopyFrom(
            ingest.RetryPolicy(
                max_attempts=job.retry.max_attempts,
                initial_backoff=to_duration("initial_backoff_s", job.retry.initial_backoff_s),
                max_backoff=to_duration("max_backoff_s", job.retry.max_backoff_s),
                retry_codes=[to_code(code) for code in job.retry.codes],
            )
        )
        if job.retry.attempt_timeout_s is not None:
            message.retry.attempt_timeout.CopyFrom(to_duration("attempt_timeout_s", job.retry.attempt_timeout_s))
    if job.deadline is not None:
        message.deadline.CopyFrom(to_duration("deadline", job.deadline))
    if job.not_before is not None:
        try:
            message.not_before.FromDatetime(job.not_before.astimezone(UTC))
        except (ValueError, OverflowError) as err:
            # The year 1 or 9999, in another time zone.
            raise InvalidArgument(f"not_before: {job.not_before} cannot be converted to UTC: {err}") from err
    if job.delay is not None:
        message.delay.CopyFrom(to_duration("delay", job.delay))
    message.depends_on.extend(ingest.Dependency(job_id=job_id) for job_id in job.depends_on)
    message.depends_on.extend(ingest.Dependency(idempotency_key=one) for one in job.depends_on_keys)
    if job.fails_with_dependencies:
        message.on_dependency_failure = ingest.ON_DEPENDENCY_FAILURE_FAIL
    return message


def to_code(code: Code | str | int) -> int:
    """Return the number of a status code, from its number or name.

    Raises:
        InvalidArgument: no such code.
    """
    try:
        return int(Code[code.upper()] if isinstance(code, str) else Code(code))
    except (KeyError, ValueError):
        known = ", ".join(each.name.lower() for each in Code if each is not Code.OK)
        raise InvalidArgument(f"status code {code!r}: use one of {known}") from None


def to_duration(field: str, value: float | timedelta) -> Duration:
    """Return the message of a duration in seconds.

    Raises:
        InvalidArgument: the value is not finite, or exceeds the range of a duration.
    """
    duration = Duration()
    try:
        duration.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    except (ValueError, OverflowError) as err:
        # NaN; infinity, and more than a thousand million days.
        raise InvalidArgument(f"{field}: expected seconds, got {value}") from err
    return duration


def to_state(state: JobState | str | None) -> str:
    """Return the wire name of a state; None gives the name for "any". Raises ValueError for other values."""
    if state is None:
        return "JOB_STATE_UNSPECIFIED"
    known = JobState(state)
    if known is JobState.UNKNOWN:
        raise ValueError("unknown cannot be requested")
    return f"JOB_STATE_{known.name}"


def of_state(number: int) -> JobState:
    """Return the state with a wire number."""
    try:
        return JobState[ingest.JobState.Name(number).removeprefix("JOB_STATE_")]
    except (ValueError, KeyError):
        return JobState.UNKNOWN


def of_job(message: ingest.Job) -> Job:
    """Return the Job of a message."""
    return Job(
        id=message.id,
        state=of_state(message.state),
        model_name=message.model_name,
        model_version=message.model_version,
        tenant=message.tenant,
        idempotency_key=message.idempotency_key,
        attempts=message.attempts,
        last_code=message.last_code,
        last_message=message.last_message,
        submitted_at=of_time(message, "submitted_at"),
        updated_at=of_time(message, "updated_at"),
        not_before=of_time(message, "not_before"),
        deadline=of_time(message, "deadline"),
        labels=dict(message.labels),
        transitions=tuple(
            Transition(
                of_state(step.state),
                of_time(step, "at"),
                step.attempt,
                step.instance,
                step.reason,
                step.generation or 1,
            )
            for step in message.transitions
        ),
        keeps_request=message.keeps_request,
        priority=message.priority,
        generation=message.generation or 1,
        waits_for=tuple(one.job_id or f"key:{one.idempotency_key}" for one in message.waits_for),
    )
