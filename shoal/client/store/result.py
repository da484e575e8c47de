"""A result as the store keeps it: how a job ended, and with what."""

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
    """How a job ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"
    """An outcome that this client is too old to know."""


@dataclass(frozen=True)
class JobResult:
    """The one result of a job."""

    job_id: str
    outcome: Outcome
    model_name: str = ""
    model_version: str = ""
    """The version that answered; empty when none did."""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    """gRPC status code and message of the last attempt, when it failed."""
    message: str = ""
    attempt: int = 0
    """The attempt that produced it, from 1; 0 when none ran."""
    instance: str = ""
    """The infer instance that answered."""
    submitted_at: datetime | None = None
    recorded_at: datetime | None = None
    answer: InferResult | None = None
    """The model's answer, when it succeeded and was asked for."""
    answer_removed_at: datetime | None = None
    """Retention has taken the answer out and left the rest."""
    answer_lost: str = ""
    """Why the answer cannot be read: it is damaged in the store. All else that is known of the job is here."""


@dataclass(frozen=True)
class ResultFilter:
    """Which results: each field that is set narrows it."""

    job_ids: tuple[str, ...] = ()
    model: str = ""
    version: str = ""
    tenant: str = ""
    outcome: Outcome | str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Every one of these, with this value."""
    since: datetime | None = None
    """Recorded then or later. Without a time zone: local time."""
    until: datetime | None = None
    """Recorded before then."""


def to_filter(wanted: ResultFilter) -> store.ResultFilter:
    """The message of a filter.

    Raises:
        InvalidArgument: there is no such outcome.
    """
    message = store.ResultFilter(
        job_ids=wanted.job_ids,
        model_name=wanted.model,
        model_version=str(wanted.version),
        tenant=wanted.tenant,
        outcome=_to_outcome(wanted.outcome),
        labels=dict(wanted.labels),
    )
    if wanted.since is not None:
        message.since.FromDatetime(wanted.since.astimezone(UTC))
    if wanted.until is not None:
        message.until.FromDatetime(wanted.until.astimezone(UTC))
    return message


def to_query(message: store.ResultFilter, **page: object) -> store.QueryResultsRequest:
    """The question for one page of a filter."""
    query = store.QueryResultsRequest(**page)  # type: ignore[arg-type]
    # The two name their fields alike, and some by other numbers.
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
    """The value of the message.

    Raises:
        DataLoss: the tensors of its answer do not fit what it says of them.
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
