"""A job: what is submitted, and how it stands."""

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
    """QUEUED and RUNNING go on; the rest are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The request is at fault: no retry can mend it."""
    DEAD = "dead"
    """Out of attempts."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Its deadline passed."""
    UNKNOWN = "unknown"
    """A state that this client is too old to know."""

    @property
    def ended(self) -> bool:
        """It stays as it is."""
        return self not in (JobState.QUEUED, JobState.RUNNING, JobState.UNKNOWN)


@dataclass(frozen=True)
class JobRetry:
    """How often and how soon a job is tried again by the node."""

    max_attempts: int = 5
    """In all, 1 to 100."""
    initial_backoff_s: float = 0.2
    """Wait before the second attempt; doubled for each further one, with full jitter."""
    max_backoff_s: float = 30.0
    codes: Collection[Code | str] = ()
    """Status codes that are worth another attempt, `Code.UNAVAILABLE` or "unavailable"; with any other the job fails at
    once. Empty: all but those that say that the request is at fault."""


@dataclass(frozen=True)
class JobRequest(InferRequest):
    """A request to a model that should not be lost."""

    idempotency_key: str = ""
    """A second job with the same key is answered with the first. Empty: a key of its own, so that retries are safe."""
    tenant: str = ""
    deadline: float | timedelta | None = None
    """The job expires when it has no answer so many seconds after it was accepted."""
    retry: JobRetry | None = None
    """None: the node's default."""
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    """-9 to 9: which of the tenant's own jobs go first. A level is worth a minute of waiting."""
    keep_request: bool = False
    """The node keeps the inputs when the job is done: for `shoal models quantize`, or for asking another version."""
    not_before: datetime | None = None
    """Not run before then. A time without a zone is local time."""
    delay: float | timedelta | None = None
    """Not run before so many seconds have passed since it was accepted. Not together with `not_before`."""
    depends_on: Sequence[str] = ()
    """Ids of jobs that must succeed first."""
    depends_on_keys: Sequence[str] = ()
    """The same by idempotency key: jobs of the same tenant, which exist or come earlier in the same stream."""
    fails_with_dependencies: bool = False
    """It fails when one of them does not succeed, and so can be requeued. Else it is cancelled."""


@dataclass(frozen=True)
class Transition:
    """One step of a job."""

    state: JobState
    at: datetime | None
    attempt: int
    """From 1; 0 before the first."""
    instance: str
    """The ingest instance that made it."""
    reason: str
    generation: int = 1


@dataclass(frozen=True)
class Job:
    """A job as it stood when the node was asked."""

    id: str
    state: JobState
    model_name: str
    model_version: str
    tenant: str = ""
    idempotency_key: str = ""
    attempts: int = 0
    """Started so far."""
    last_code: int = 0
    """gRPC status code and message of the last attempt that failed."""
    last_message: str = ""
    submitted_at: datetime | None = None
    updated_at: datetime | None = None
    not_before: datetime | None = None
    """Not run before then: it was asked for, or backoff."""
    deadline: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    transitions: tuple[Transition, ...] = ()
    """All so far, oldest first."""
    keeps_request: bool = False
    """Its inputs stay when it is done."""
    priority: int = 0
    """As submitted."""
    generation: int = 1
    """How often it was begun: each requeue of a dead letter begins it again, with all its attempts."""
    waits_for: tuple[str, ...] = ()
    """The jobs that must succeed before it runs, and have not yet: ids, or `key:` and an idempotency key."""

    @property
    def ended(self) -> bool:
        """It stays as it is."""
        return self.state.ended


@dataclass(frozen=True)
class Submitted:
    """The acknowledgement of one job of a stream."""

    index: int
    """Which one: counted from 0 in the order of submission."""
    job_id: str = ""
    """Set when the job is durable."""
    existed: bool = False
    """The node knew its idempotency key: this is the earlier job."""
    error: ShoalError | None = None
    """Why it was refused."""


@dataclass(frozen=True)
class Ran:
    """The result of one job of a stream."""

    index: int
    """Which one: counted from 0 in the order of submission."""
    job_id: str = ""
    """Empty when the node refused it."""
    result: InferResult | None = None
    error: ShoalError | None = None
    """Why there is no result: it was refused, failed, was cancelled or expired."""


def to_submit(job: JobRequest, request: oip.ModelInferRequest, *, key: str, tenant: str) -> ingest.SubmitRequest:
    """The message of `job`, whose inference request is `request`."""
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
    if job.deadline is not None:
        message.deadline.CopyFrom(to_duration("deadline", job.deadline))
    if job.not_before is not None:
        try:
            message.not_before.FromDatetime(job.not_before.astimezone(UTC))
        except (ValueError, OverflowError) as err:  # The year 1 or 9999, in another zone.
            raise InvalidArgument(f"not_before: {job.not_before} is no time in UTC: {err}") from err
    if job.delay is not None:
        message.delay.CopyFrom(to_duration("delay", job.delay))
    message.depends_on.extend(ingest.Dependency(job_id=job_id) for job_id in job.depends_on)
    message.depends_on.extend(ingest.Dependency(idempotency_key=one) for one in job.depends_on_keys)
    if job.fails_with_dependencies:
        message.on_dependency_failure = ingest.ON_DEPENDENCY_FAILURE_FAIL
    return message


def to_code(code: Code | str | int) -> int:
    """A status code by its number or its name.

    Raises:
        InvalidArgument: there is no such code.
    """
    try:
        return int(Code[code.upper()] if isinstance(code, str) else Code(code))
    except (KeyError, ValueError):
        known = ", ".join(each.name.lower() for each in Code if each is not Code.OK)
        raise InvalidArgument(f"status code {code!r}: use one of {known}") from None


def to_duration(field: str, value: float | timedelta) -> Duration:
    """The message of so many seconds.

    Raises:
        InvalidArgument: they are not finite, or too many for a duration.
    """
    duration = Duration()
    try:
        duration.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    except (ValueError, OverflowError) as err:  # NaN; infinity, and beyond a thousand million days.
        raise InvalidArgument(f"{field}: expected seconds, got {value}") from err
    return duration


def to_state(state: JobState | str | None) -> str:
    """The wire's name of a state; of None, the one that means any. Raises ValueError when it is none."""
    if state is None:
        return "JOB_STATE_UNSPECIFIED"
    known = JobState(state)
    if known is JobState.UNKNOWN:
        raise ValueError("unknown is no state to ask for")
    return f"JOB_STATE_{known.name}"


def of_state(number: int) -> JobState:
    """The state of the wire's number."""
    try:
        return JobState[ingest.JobState.Name(number).removeprefix("JOB_STATE_")]
    except (ValueError, KeyError):
        return JobState.UNKNOWN


def of_job(message: ingest.Job) -> Job:
    """The value of the message."""
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
