"""Checks of results and of queries; errors name the field and the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.store.artifacts.digest import brief
from services.store.results import generations
from services.store.results.waiting import MOST_WAIT_S
from shoal.errors import InvalidArgument
from shoal.store.v1.store_pb2 import QueryResultsRequest, Result, ResultFilter

MAX_RESULTS = 1_000
MAX_JOB_ID_CHARACTERS = 64
MAX_TEXT_CHARACTERS = 1_024
MAX_MESSAGE_CHARACTERS = 65_536
MAX_LABELS, MAX_LABEL_CHARACTERS = 64, 256
MAX_RESPONSE_BYTES = 120 << 20
"""A response that arrived in one message must fit one message again, with space for the rest of its result."""
DEFAULT_PAGE, MAX_PAGE = 100, 1_000
_TEXTS = ("model_name", "model_version", "lease_id", "tenant", "instance")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Years 1 to 9999, the range of a Timestamp.
_EARLIEST_S, _LATEST_S = -62135596800, 253402300799


def check_results(results: Sequence[Result]) -> None:
    """Check that all results may be recorded; otherwise none is.

    Raises:
        InvalidArgument: no results, too many, two of one job, or a bad field; names the entry.
    """
    if not 1 <= len(results) <= MAX_RESULTS:
        raise InvalidArgument(f"results: expected 1 to {MAX_RESULTS} of them, got {len(results)}")
    first: dict[str, int] = {}
    for at, result in enumerate(results):
        _check_result(result, f"results[{at}]")
        if (before := first.setdefault(result.job_id, at)) != at:
            raise InvalidArgument(
                f"results[{at}].job_id: {brief(result.job_id)} is in results[{before}] already: one result per job"
            )


def check_job_id(job_id: str, field: str = "job_id") -> str:
    """Return a job id. Raises InvalidArgument when it is invalid."""
    if not 1 <= len(job_id) <= MAX_JOB_ID_CHARACTERS or not job_id.isprintable():
        raise InvalidArgument(
            f"{field}: expected 1 to {MAX_JOB_ID_CHARACTERS} printable characters, got {brief(job_id)}"
        )
    return job_id


def _check_result(result: Result, where: str) -> None:
    check_job_id(result.job_id, f"{where}.job_id")
    if result.outcome == Result.OUTCOME_UNSPECIFIED or result.outcome not in Result.Outcome.values():
        known = ", ".join(name for name, number in Result.Outcome.items() if number)
        raise InvalidArgument(f"{where}.outcome: expected one of {known}; got {result.outcome}")
    for field in _TEXTS:
        check_text(getattr(result, field), f"{where}.{field}")
    check_text(result.message, f"{where}.message", MAX_MESSAGE_CHARACTERS)
    check_labels(result.labels, f"{where}.labels")
    if not 0 <= result.code <= 16:
        raise InvalidArgument(f"{where}.code: expected a gRPC status code, 0 to 16, got {result.code}")
    if result.attempt < 0:
        raise InvalidArgument(f"{where}.attempt: expected 0 or more, got {result.attempt}")
    if not 0 <= result.generation <= generations.MOST:
        raise InvalidArgument(f"{where}.generation: expected 0 to {generations.MOST}, got {result.generation}")
    if result.HasField("response"):
        _check_response(result, where)
    if result.HasField("submitted_at"):
        check_time(result.submitted_at, f"{where}.submitted_at")


def _check_response(result: Result, where: str) -> None:
    if result.outcome != Result.OUTCOME_SUCCEEDED:
        raise InvalidArgument(f"{where}.response: only a result that succeeded has one")
    if (size := result.response.ByteSize()) > MAX_RESPONSE_BYTES:
        raise InvalidArgument(f"{where}.response: {size} bytes are too many: {MAX_RESPONSE_BYTES} at most")


def check_text(text: str, field: str, most: int = MAX_TEXT_CHARACTERS) -> str:
    """Return a text. Raises InvalidArgument when it is too long."""
    if len(text) > most:
        raise InvalidArgument(f"{field}: {len(text)} characters are too many: {most} at most")
    return text


def check_time(time: Timestamp, field: str) -> None:
    """Raise InvalidArgument when a Timestamp is out of range."""
    if not _EARLIEST_S <= time.seconds <= _LATEST_S or not 0 <= time.nanos < 1_000_000_000:
        raise InvalidArgument(f"{field}: expected a time in the years 1 to 9999 with 0 to 999999999 nanos")


def check_labels(labels: Mapping[str, str], field: str) -> None:
    """Raise InvalidArgument when labels are not allowed for a job."""
    if len(labels) > MAX_LABELS:
        raise InvalidArgument(f"{field}: {len(labels)} are too many: {MAX_LABELS} at most")
    for key, value in labels.items():
        check_text(key, f"{field}: key {brief(key)}", MAX_LABEL_CHARACTERS)
        check_text(value, f"{field}[{brief(key)}]", MAX_LABEL_CHARACTERS)


def check_page_size(query: QueryResultsRequest) -> int:
    """Return the requested page size.

    Raises:
        InvalidArgument: the size is out of range.
    """
    if not 0 <= query.page_size <= MAX_PAGE:
        raise InvalidArgument(f"page_size: expected 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}; got {query.page_size}")
    return query.page_size or DEFAULT_PAGE


def check_filter(result_filter: ResultFilter) -> None:
    """Check every field of a filter.

    Raises:
        InvalidArgument: a field is invalid.
    """
    if len(result_filter.job_ids) > MAX_RESULTS:
        raise InvalidArgument(f"job_ids: {len(result_filter.job_ids)} are too many: {MAX_RESULTS} at most")
    _check_each(result_filter.job_ids)
    for field in ("model_name", "model_version", "tenant"):
        check_text(getattr(result_filter, field), field)
    if result_filter.outcome not in Result.Outcome.values():
        raise InvalidArgument(f"outcome: there is no outcome {result_filter.outcome}")
    for field in ("since", "until"):
        if result_filter.HasField(field):
            check_time(getattr(result_filter, field), field)
    check_labels(result_filter.labels, "labels")


def _check_each(job_ids: Iterable[str]) -> None:
    for at, job_id in enumerate(job_ids):
        check_job_id(job_id, f"job_ids[{at}]")


def check_wait(wait: Duration) -> float:
    """Return the requested wait in seconds. Raises InvalidArgument when it is out of range."""
    seconds = wait.seconds + wait.nanos / 1e9
    if not 0 <= seconds <= MOST_WAIT_S or wait.nanos < 0:
        raise InvalidArgument(f"wait: expected 0 to {MOST_WAIT_S:g} s, got {wait.seconds} s and {wait.nanos} ns")
    return seconds


def milliseconds_up(time: Timestamp) -> datetime:
    """Return the first whole millisecond at or after `time`; stored times compare with it as they do with `time`."""
    up = -(-time.nanos // 1_000_000)
    if (time.seconds, up) == (_LATEST_S, 1_000):
        # A datetime has no later millisecond.
        up = 999
    return _EPOCH + timedelta(seconds=time.seconds, milliseconds=up)
