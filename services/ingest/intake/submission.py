"""Validation of a SubmitRequest, and its conversion to a job. Errors name the field.

Of the inference request only the model's name and the size are checked. Only the model knows what its tensors must be:
a job with wrong tensors ends as FAILED with the model's error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta

from services.ingest.dependencies.references import references_of
from services.ingest.job import DEFAULT_POLICY, Job, Policy, acceptance
from services.ingest.limits import (
    CONNECTOR_LABEL,
    EXPLAIN,
    KEY_CHARS,
    LABEL_CHARS,
    LABELS,
    LONGEST_ATTEMPT,
    LONGEST_BACKOFF,
    LONGEST_DEADLINE,
    LONGEST_DELAY,
    MODEL_NAME_CHARS,
    MODEL_VERSION_CHARS,
    MOST_ATTEMPTS,
    REQUEST_BYTES,
    SCHEDULED,
    SOURCE_LABEL,
    ms_of,
)
from services.ingest.messages import moment_of
from services.ingest.tenant_queue import LEAST_PRIORITY, MOST_PRIORITY
from shoal.access.policy import TENANT_CHARS
from shoal.errors import Code, InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

_FAILURES = frozenset(Code) - {Code.OK}


def check_not_reserved(submit: pb.SubmitRequest) -> None:
    """Reject an idempotency key that is reserved for schedules, and a job that would pass for a connector's.

    Raises:
        InvalidArgument: the key or the labels are reserved.
    """
    if submit.idempotency_key.startswith(SCHEDULED):
        key = submit.idempotency_key[:KEY_CHARS]
        raise InvalidArgument(f"idempotency_key: {key!r} is reserved: {SCHEDULED!r} begins the keys of schedules' jobs")
    if submit.idempotency_key and CONNECTOR_LABEL in submit.labels and SOURCE_LABEL in submit.labels:
        raise InvalidArgument(
            f"labels: {CONNECTOR_LABEL!r} and {SOURCE_LABEL!r} together are reserved for the jobs of connectors: "
            "rename one, or leave the idempotency_key out"
        )


def job_of(
    submit: pb.SubmitRequest,
    *,
    job_id: str,
    now: datetime,
    instance: str,
    inline_bytes: int,
    traceparent: str,
    caller: bytes = b"",
) -> Job:
    """Return the job of a valid submit, accepted at `now`, with the serialised request. It runs for `caller`.

    Raises:
        InvalidArgument: a field is invalid; the message names it, and what was expected and received.
    """
    request = _request(submit)
    at_most("idempotency_key", submit.idempotency_key, KEY_CHARS)
    at_most("tenant", submit.tenant, TENANT_CHARS)
    deadline = _deadline(submit)
    due_at = _due_at(submit, now)
    if deadline is not None and due_at >= now + deadline:
        raise InvalidArgument("deadline: before the earliest start of the job (`not_before` or `delay`)")
    depends_on = references_of(submit, KEY_CHARS)
    return Job(
        id=job_id,
        model_name=submit.request.model_name,
        model_version=submit.request.model_version,
        submitted_at=now,
        updated_at=now,
        tenant=submit.tenant,
        key=submit.idempotency_key,
        digest=digest_of(submit) if submit.idempotency_key else b"",
        policy=_policy(submit.retry) if submit.HasField("retry") else DEFAULT_POLICY,
        priority=_priority(submit.priority),
        deadline=None if deadline is None else now + deadline,
        labels=labels_of(submit.labels),
        explains=submit.request.parameters[EXPLAIN].bool_param if EXPLAIN in submit.request.parameters else False,
        is_apart=len(request) > inline_bytes,
        keep_request=submit.keep_request,
        request=request,
        due_at=None if depends_on else due_at,
        depends_on=depends_on,
        waits_for=depends_on,
        not_before=due_at if depends_on and due_at > now else None,
        fails_on_dependency=submit.on_dependency_failure == pb.ON_DEPENDENCY_FAILURE_FAIL,
        traceparent=traceparent,
        caller=caller,
        transitions=acceptance(now, instance, due_at, len(depends_on)),
    )


def digest_of(submit: pb.SubmitRequest | pb.SubmitBatchRequest) -> bytes:
    """Return the SHA-256 of all fields, with maps in order, which identifies equal submits.

    protobuf guarantees a stable deterministic serialisation only within one version. A submit that is repeated across
    an upgrade may therefore be rejected as different, but different submits are never taken as equal.
    """
    return hashlib.sha256(submit.SerializeToString(deterministic=True)).digest()


def _request(submit: pb.SubmitRequest) -> bytes:
    if not submit.HasField("request"):
        raise InvalidArgument("request: required, and not set")
    if not submit.request.model_name:
        raise InvalidArgument("request.model_name: required, and empty")
    at_most("request.model_name", submit.request.model_name, MODEL_NAME_CHARS)
    at_most("request.model_version", submit.request.model_version, MODEL_VERSION_CHARS)
    size = submit.request.ByteSize()
    if size > REQUEST_BYTES:
        raise InvalidArgument(f"request: at most {REQUEST_BYTES} bytes serialised, got {size}")
    return submit.request.SerializeToString()


def _policy(retry: pb.RetryPolicy) -> Policy:
    default = DEFAULT_POLICY
    if not 0 <= retry.max_attempts <= MOST_ATTEMPTS:
        raise InvalidArgument(f"retry.max_attempts: 0 (the default) to {MOST_ATTEMPTS}, got {retry.max_attempts}")
    initial_ms, max_ms = default.initial_backoff_ms, default.max_backoff_ms
    if retry.HasField("initial_backoff"):
        initial_ms = ms_of("retry.initial_backoff", retry.initial_backoff, LONGEST_BACKOFF)
        max_ms = max(max_ms, initial_ms)
    if retry.HasField("max_backoff"):
        max_ms = ms_of("retry.max_backoff", retry.max_backoff, LONGEST_BACKOFF)
        if not retry.HasField("initial_backoff"):
            initial_ms = min(initial_ms, max_ms)
        elif max_ms < initial_ms:
            raise InvalidArgument(f"retry.max_backoff: at least initial_backoff ({initial_ms} ms), got {max_ms} ms")
    attempt_ms = 0
    if retry.HasField("attempt_timeout"):
        attempt_ms = ms_of("retry.attempt_timeout", retry.attempt_timeout, LONGEST_ATTEMPT)
        if attempt_ms < 1:
            raise InvalidArgument("retry.attempt_timeout: at least 1 ms; leave it unset for the node's setting")
    return Policy(retry.max_attempts or default.max_attempts, initial_ms, max_ms, _codes(retry), attempt_ms)


def _codes(retry: pb.RetryPolicy) -> tuple[int, ...]:
    codes = list(retry.retry_codes)
    for at, code in enumerate(codes[: len(Code)]):
        if code not in _FAILURES:
            raise InvalidArgument(f"retry.retry_codes[{at}]: expected a gRPC status code, 1 to 16, got {code}")
    if len(set(codes)) != len(codes):
        raise InvalidArgument("retry.retry_codes: each code once")
    return tuple(sorted(codes))


def _due_at(submit: pb.SubmitRequest, now: datetime) -> datetime:
    if submit.HasField("not_before") and submit.HasField("delay"):
        raise InvalidArgument("delay: not together with not_before: set one of them")
    if submit.HasField("delay"):
        return now + timedelta(milliseconds=ms_of("delay", submit.delay, LONGEST_DELAY))
    if submit.HasField("not_before"):
        due_at = moment_of("not_before", submit.not_before)
        if due_at > now + LONGEST_DELAY:
            raise InvalidArgument(f"not_before: at most {LONGEST_DELAY.days} days ahead")
        return max(now, due_at)
    return now


def _priority(priority: int) -> int:
    if not LEAST_PRIORITY <= priority <= MOST_PRIORITY:
        raise InvalidArgument(f"priority: {LEAST_PRIORITY} to {MOST_PRIORITY} (0 is the default), got {priority}")
    return priority


def _deadline(submit: pb.SubmitRequest) -> timedelta | None:
    if not submit.HasField("deadline"):
        return None
    ms = ms_of("deadline", submit.deadline, LONGEST_DEADLINE)
    if ms < 1:
        raise InvalidArgument("deadline: at least 1 ms from acceptance; leave it unset for none")
    return timedelta(milliseconds=ms)


def labels_of(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return labels in the order of their keys.

    Raises:
        InvalidArgument: there are too many, or one is too long.
    """
    if len(labels) > LABELS:
        raise InvalidArgument(f"labels: at most {LABELS}, got {len(labels)}")
    for key, value in labels.items():
        at_most(f"labels[{key[:40]!r}], its key", key, LABEL_CHARS)
        at_most(f"labels[{key[:40]!r}]", value, LABEL_CHARS)
    return tuple(sorted(labels.items()))


def at_most(field: str, text: str, chars: int) -> None:
    """Raise InvalidArgument when the text of `field` is longer than `chars`."""
    if len(text) > chars:
        raise InvalidArgument(f"{field}: at most {chars} characters, got {len(text)}")
