"""Results of jobs in the store, and filters for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from shoal.client.inference.inference import InferResult, of_response
from shoal.client.models.registry import of_time
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as store


class Outcome(StrEnum):
    """Final outcome of a job."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"
    """An outcome that this version of the client does not know."""


@dataclass(frozen=True)
class JobResult:
    """The one result of a job."""

    job_id: str
    outcome: Outcome
    model_name: str = ""
    model_version: str = ""
    """The version that ran; empty without an answer."""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    """gRPC status code of the last attempt of a failed job; `message` is its message."""
    message: str = ""
    attempt: int = 0
    """Number of the attempt that produced the result, from 1; 0 when none ran."""
    instance: str = ""
    """Name of the infer instance that ran the job."""
    submitted_at: datetime | None = None
    recorded_at: datetime | None = None
    answer: InferResult | None = None
    """The model's answer; None when the job did not succeed, or the answer was not requested."""
    answer_removed_at: datetime | None = None
    """Time at which retention removed the answer."""
    answer_lost: str = ""
    """Reason why the answer cannot be read: it is damaged in the store. All other fields are intact."""


@dataclass(frozen=True)
class ResultFilter:
    """Filter of results; each field that is set narrows the selection."""

    job_ids: tuple[str, ...] = ()
    model: str = ""
    version: str = ""
    tenant: str = ""
    outcome: Outcome | str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that a result must have, with these values."""
    since: datetime | None = None
    """Earliest recording time, inclusive. A time without a zone is local time."""
    until: datetime | None = None
    """Latest recording time, exclusive."""


def to_filter(filter: ResultFilter) -> store.ResultFilter:
    """Return the message of a filter.

    Raises:
        InvalidArgument: no such outcome.
    """
    message = store.ResultFilter(
        job_ids=filter.job_ids,
        model_name=filter.model,
        model_version=str(filter.version),
        tenant=filter.tenant,
        outcome=_to_outcome(filter.outcome),
        labels=dict(filter.labels),
    )
    if filter.since is not None:
        message.since.FromDatetime(filter.since.astimezone(UTC))
    if filter.until is not None:
        message.until.FromDatetime(filter.until.astimezone(UTC))
    return message


def to_query(message: store.ResultFilter, **page: object) -> store.QueryResultsRequest:
    """Return the request for one page of a filter's results."""
    query = store.QueryResultsRequest(**page)  # type: ignore[arg-type]
    # The two messages have the same field names, but some different field numbers.
    for descriptor, value in message.ListFields():
        target = getattr(query, descriptor.name)
        if descriptor.name == "labels":
            target.update(value)
        elif descriptor.name == "job_ids":
            target.extend(value)
        elif descriptor.name in ("since", "until"):
            target.CopyFrom(value)
        else:
            setattr(query, descriptor.name, value)
    return query


def _to_outcome(outcome: Outcome | str | None) -> str:
    if outcome is None:
        return "OUTCOME_UNSPECIFIED"
    known = [each for each in Outcome if each is not Outcome.UNKNOWN]
    if outcome not in known:
        raise InvalidArgument(f"outcome {str(outcome)!r}: use one of {', '.join(known)}")
    return f"OUTCOME_{Outcome(outcome).name}"


def _of_outcome(number: int) -> Outcome:
    try:
        return Outcome[store.Result.Outcome.Name(number).removeprefix("OUTCOME_")]
    except (ValueError, KeyError):
        return Outcome.UNKNOWN


def of_stored(message: store.Result) -> JobResult:
    """Return the JobResult of a message.

    Raises:
        DataLoss: the tensors' contents do not fit their shape or datatype.
    """
    return JobResult(
        job_id=message.job_id,
        outcome=_of_outcome(message.outcome),
        model_name=message.model_name,
        model_version=message.model_version,
        tenant=message.tenant,
        labels=dict(message.labels),
        code=message.code,
        message=message.message,
        attempt=message.attempt,
        instance=message.instance,
        submitted_at=of_time(message, "submitted_at"),
        recorded_at=of_time(message, "recorded_at"),
        answer=of_response(message.response) if message.HasField("response") else None,
        answer_removed_at=of_time(message, "answer_removed_at"),
        answer_lost=message.answer_lost,
    )
