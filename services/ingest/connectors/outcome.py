"""Conversion of a message to a job, and of the job's result to an outgoing message. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from services.ingest.connectors.connector_spec import ConnectorSpec
from services.ingest.connectors.message import Message, Outgoing, job_key
from services.ingest.limits import CONNECTOR_LABEL, LABEL_CHARS, SOURCE_LABEL
from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2

PREFIX = "shoal-"
JOB, SOURCE, CONNECTOR = f"{PREFIX}job-id", f"{PREFIX}source", f"{PREFIX}connector"
MODEL, VERSION = f"{PREFIX}model", f"{PREFIX}model-version"
CODE, MESSAGE, OMITTED = f"{PREFIX}code", f"{PREFIX}message", f"{PREFIX}omitted-bytes"
_MESSAGE_CHARS = 1_000


@dataclass(frozen=True, slots=True)
class MessageFailure:
    """Reason for which a message has no answer."""

    code: int
    message: str
    job_id: str = ""
    """Empty when no job was submitted."""


def submit_of(spec: ConnectorSpec, message: Message) -> pb.SubmitRequest:
    """Return the submission of a message's job: the same at each delivery.

    Raises:
        InvalidArgument: the message is malformed.
    """
    submit = pb.SubmitRequest(
        request=spec.format.request(message.value),
        idempotency_key=job_key(spec.name, message),
        tenant=spec.tenant,
        retry=spec.retry,
        labels={**dict(spec.labels), CONNECTOR_LABEL: spec.name, SOURCE_LABEL: message.location[-LABEL_CHARS:]},
    )
    if spec.deadline_s is not None:
        deadline = Duration()
        deadline.FromTimedelta(timedelta(seconds=spec.deadline_s))
        submit.deadline.CopyFrom(deadline)
    return submit


def failed_of(result: store_pb2.Result) -> MessageFailure | None:
    """Return the failure of a job; None when the job has an answer."""
    if result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
        return None
    return MessageFailure(result.code, result.message, result.job_id)


def answer_of(spec: ConnectorSpec, message: Message, result: store_pb2.Result) -> Outgoing:
    """Return the answer of a job as a message, with the headers of the source message.

    Raises:
        InvalidArgument, DataLoss: the answer cannot be encoded in the connector's format.
    """
    headers = {
        JOB: result.job_id,
        SOURCE: message.location,
        CONNECTOR: spec.name,
        MODEL: result.response.model_name or result.model_name,
        VERSION: result.response.model_version or result.model_version,
    }
    return Outgoing(spec.format.encode(result.response), message.key, _headers(message, headers))


def dead_letter(spec: ConnectorSpec, message: Message, failed: MessageFailure, *, is_whole: bool = True) -> Outgoing:
    """Return the dead letter of a message, with the reason in its headers.

    Without `is_whole`, the value and the source's headers are left out, and `shoal-source` has the message's location.
    """
    headers = {SOURCE: message.location, CONNECTOR: spec.name, CODE: _name_of(failed.code)}
    if failed.job_id:
        headers[JOB] = failed.job_id
    headers[MESSAGE] = failed.message[:_MESSAGE_CHARS]
    if is_whole:
        return Outgoing(message.value, message.key, _headers(message, headers))
    headers[OMITTED] = str(message.nbytes)
    return Outgoing(b"", None, _encoded(headers))


def _headers(message: Message, headers: dict[str, str]) -> tuple[tuple[str, bytes], ...]:
    kept = tuple((name, value) for name, value in message.headers if not name.startswith(PREFIX))
    return kept + _encoded(headers)


def _encoded(headers: dict[str, str]) -> tuple[tuple[str, bytes], ...]:
    """Return headers. A lone surrogate, which a reason may quote, is written as `\\ud800`."""
    return tuple((name, value.encode(errors="backslashreplace")) for name, value in headers.items() if value)


def _name_of(code: int) -> str:
    try:
        return Code(code).name
    except ValueError:
        return str(code)
