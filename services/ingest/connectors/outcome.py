"""What is made of a message, and of how its job ended. Plain functions of values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from services.ingest.connectors.connector_spec import ConnectorSpec
from services.ingest.connectors.message import Message, Outgoing, job_key
from services.ingest.limits import LABEL_CHARS
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
    """Why a message has no answer."""

    code: int
    message: str
    job_id: str = ""
    """Empty where it never became a job."""


def submit_of(plan: ConnectorSpec, message: Message) -> pb.SubmitRequest:
    """The job of a message: the same at each delivery.

    Raises:
        InvalidArgument: says what is wrong with the message.
    """
    submit = pb.SubmitRequest(
        request=plan.format.request(message.value),
        idempotency_key=job_key(plan.name, message),
        tenant=plan.tenant,
        retry=plan.retry,
        labels={**dict(plan.labels), "connector": plan.name, "source": message.place[-LABEL_CHARS:]},
    )
    if plan.deadline_s is not None:
        deadline = Duration()
        deadline.FromTimedelta(timedelta(seconds=plan.deadline_s))
        submit.deadline.CopyFrom(deadline)
    return submit


def failed_of(result: store_pb2.Result) -> MessageFailure | None:
    """Why a job has no answer; None: it has one."""
    if result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
        return None
    return MessageFailure(result.code, result.message, result.job_id)


def answered(plan: ConnectorSpec, message: Message, result: store_pb2.Result) -> Outgoing:
    """The message of an answer. The source's headers travel on.

    Raises:
        InvalidArgument, DataLoss: the answer cannot be written so.
    """
    about = {
        JOB: result.job_id,
        SOURCE: message.place,
        CONNECTOR: plan.name,
        MODEL: result.response.model_name or result.model_name,
        VERSION: result.response.model_version or result.model_version,
    }
    return Outgoing(plan.format.answer(result.response), message.key, _headers(message, about))


def dead_letter(plan: ConnectorSpec, message: Message, failed: MessageFailure, *, is_whole: bool = True) -> Outgoing:
    """A message as it came, with the reason in its headers. Not `is_whole`: only where it lies."""
    about = {SOURCE: message.place, CONNECTOR: plan.name, CODE: _name_of(failed.code)}
    if failed.job_id:
        about[JOB] = failed.job_id
    about[MESSAGE] = failed.message[:_MESSAGE_CHARS]
    if is_whole:
        return Outgoing(message.value, message.key, _headers(message, about))
    about[OMITTED] = str(message.nbytes)
    return Outgoing(b"", None, _encoded(about))


def _headers(message: Message, about: dict[str, str]) -> tuple[tuple[str, bytes], ...]:
    kept = tuple((name, value) for name, value in message.headers if not name.startswith(PREFIX))
    return kept + _encoded(about)


def _encoded(about: dict[str, str]) -> tuple[tuple[str, bytes], ...]:
    """As headers. A reason may quote half a character, which is written as `\\ud800`."""
    return tuple((name, value.encode(errors="backslashreplace")) for name, value in about.items() if value)


def _name_of(code: int) -> str:
    try:
        return Code(code).name
    except ValueError:
        return str(code)
