"""What may be submitted, and how what may not is named."""

from __future__ import annotations

from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.ingest import documents
from services.ingest.intake.submission import digest_of, job_of
from services.ingest.job import Job, Policy, State
from services.ingest.messages import timestamp_of
from shoal.errors import InvalidArgument
from shoal.inference.v2 import inference_pb2
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.faults import submit
from tests.ingest.making import START


def made(request: pb.SubmitRequest, inline_bytes: int = 1 << 20) -> Job:
    return job_of(request, job_id="id", now=START, instance="i", inline_bytes=inline_bytes, traceparent="")


def test_a_plain_one_gets_the_defaults() -> None:
    job = made(submit(data=b"x"))
    assert job.state is State.QUEUED
    assert job.due_at == job.submitted_at == START
    assert job.policy == Policy(5, 200, 30_000)
    assert job.deadline is None
    assert inference_pb2.ModelInferRequest.FromString(job.request or b"").raw_input_contents == [b"x"]


def test_all_that_may_be_asked_for() -> None:
    job = made(
        submit(
            idempotency_key="k" * 128,
            tenant="t" * 64,
            retry=pb.RetryPolicy(
                max_attempts=100, initial_backoff=Duration(nanos=5_000_000), max_backoff=Duration(seconds=1)
            ),
            deadline=Duration(seconds=90, nanos=1_000_000),
            priority=-9,
            labels={"ü" * 256: "v" * 256, **{str(n): "" for n in range(63)}},
        )
    )
    assert job.policy == Policy(100, 5, 1_000)
    assert job.deadline == START + timedelta(seconds=90, milliseconds=1)
    assert job.tenant_queue == ("t" * 64, "echo", -9)
    assert len(job.labels) == 64
    assert len(job.digest) == 32


def test_codes_that_are_worth_a_retry() -> None:
    assert made(submit()).policy.codes == ()
    assert made(submit(retry=pb.RetryPolicy(retry_codes=[14, 4]))).policy.codes == (4, 14)


def test_a_job_may_ask_for_longer_attempts() -> None:
    job = made(submit(retry=pb.RetryPolicy(attempt_timeout=Duration(seconds=3_600))))
    assert job.policy == Policy(attempt_timeout_ms=3_600_000)
    assert documents.job_of(documents.document_of(job)).policy == job.policy
    for wrong, says in ((Duration(seconds=3_601), "at most 3600 s"), (Duration(nanos=1), "at least 1 ms")):
        with pytest.raises(InvalidArgument, match=f"retry.attempt_timeout: {says}"):
            made(submit(retry=pb.RetryPolicy(attempt_timeout=wrong)))


def test_when_it_may_run() -> None:
    assert made(submit(delay=Duration(seconds=90))).due_at == START + timedelta(seconds=90)
    assert made(submit(delay=Duration())).due_at == START
    later = made(submit(not_before=timestamp_of(START + timedelta(days=1))))
    assert later.due_at == START + timedelta(days=1)
    assert later.transitions[0].reason == "submitted, not to run before 2026-01-03T03:04:05.678+00:00"
    assert made(submit(not_before=Timestamp(seconds=-5))).due_at == START  # Has passed: at once.
    fraction = Timestamp(seconds=int(START.timestamp()) + 9, nanos=1)
    assert made(submit(not_before=fraction)).due_at == START.replace(microsecond=1_000) + timedelta(seconds=9)


def test_backoffs_that_are_half_given_fit_together() -> None:
    assert made(submit(retry=pb.RetryPolicy(initial_backoff=Duration(seconds=60)))).policy == Policy(5, 60_000, 60_000)
    assert made(submit(retry=pb.RetryPolicy(max_backoff=Duration(nanos=50_000_000)))).policy == Policy(5, 50, 50)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.SubmitRequest(), "request: required, and not set"),
        (pb.SubmitRequest(request=inference_pb2.ModelInferRequest()), "request.model_name: required, and empty"),
        (submit(model="m" * 129), "request.model_name: at most 128 characters, got 129"),
        (submit(data=b"x" * (12 << 20)), "request: at most 12582912 bytes serialised, got 125829"),
        (submit(idempotency_key="k" * 129), "idempotency_key: at most 128 characters, got 129"),
        (submit(tenant="t" * 65), "tenant: at most 64 characters, got 65"),
        (submit(retry=pb.RetryPolicy(max_attempts=-1)), "retry.max_attempts: 0 .* to 100, got -1"),
        (submit(retry=pb.RetryPolicy(max_attempts=101)), "retry.max_attempts: 0 .* to 100, got 101"),
        (submit(retry=pb.RetryPolicy(initial_backoff=Duration(seconds=-1))), "retry.initial_backoff: must not be neg"),
        (submit(retry=pb.RetryPolicy(max_backoff=Duration(seconds=90_000))), "retry.max_backoff: at most 86400 s"),
        (
            submit(retry=pb.RetryPolicy(initial_backoff=Duration(seconds=2), max_backoff=Duration(seconds=1))),
            "retry.max_backoff: at least initial_backoff",
        ),
        (submit(priority=10), r"priority: -9 to 9 \(0 is the default\), got 10"),
        (submit(priority=-(2**31)), "priority: -9 to 9 .*, got -2147483648"),
        (submit(deadline=Duration()), "deadline: at least 1 ms"),
        (submit(deadline=Duration(seconds=-5)), "deadline: must not be negative"),
        (submit(deadline=Duration(seconds=2**62)), "deadline: at most 316224000 s"),
        (submit(deadline=Duration(seconds=1, nanos=-1)), "deadline: not a valid duration"),
        (submit(deadline=Duration(seconds=1, nanos=2_000_000_000)), "deadline: not a valid duration"),
        (submit(retry=pb.RetryPolicy(retry_codes=[14, 0])), r"retry.retry_codes\[1\]: expected .* 1 to 16, got 0"),
        (submit(retry=pb.RetryPolicy(retry_codes=[17])), r"retry.retry_codes\[0\]: expected .* got 17"),
        (submit(retry=pb.RetryPolicy(retry_codes=[4, 14, 4])), "retry.retry_codes: each code once"),
        (submit(retry=pb.RetryPolicy(retry_codes=[1] * 100_000)), "retry.retry_codes: each code once"),
        (submit(delay=Duration(seconds=-1)), "delay: must not be negative"),
        (submit(delay=Duration(seconds=2**60)), "delay: at most 316224000 s"),
        (submit(not_before=Timestamp(seconds=2**61)), "not_before: not a time in the years 1 to 9999"),
        (submit(not_before=Timestamp(seconds=253402300000)), "not_before: at most 3660 days ahead"),
        (submit(not_before=Timestamp(nanos=-1)), "not_before: not a time"),
        (submit(not_before=Timestamp(seconds=1), delay=Duration(seconds=1)), "delay: not together with not_before"),
        (
            submit(delay=Duration(seconds=9), deadline=Duration(seconds=9)),
            "deadline: before the earliest start of the job",
        ),
        (submit(labels={str(n): "" for n in range(65)}), "labels: at most 64, got 65"),
        (submit(labels={"k" * 257: ""}), "its key: at most 256 characters, got 257"),
        (submit(labels={"key": "v" * 257}), r"labels\['key'\]: at most 256 characters, got 257"),
    ],
)
def test_what_is_wrong_is_named(request_: pb.SubmitRequest, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        made(request_)


def test_a_large_request_is_kept_apart() -> None:
    assert not made(submit(data=b"x" * 100), inline_bytes=200).is_apart
    assert made(submit(data=b"x" * 200), inline_bytes=200).is_apart


def test_the_digest_tells_requests_apart_and_ignores_the_order_of_maps() -> None:
    one = submit(labels={"a": "1", "b": "2"})
    other = submit(labels={"b": "2", "a": "1"})
    assert digest_of(one) == digest_of(other)
    assert digest_of(one) != digest_of(submit(labels={"a": "1", "b": "3"}))
    assert digest_of(one) != digest_of(submit(data=b"other", labels={"a": "1", "b": "2"}))


def test_a_client_that_asks_to_explain_keeps_the_explanation() -> None:
    request = submit()
    request.request.parameters["explain"].bool_param = True
    assert made(request).explains
    request.request.parameters["explain"].bool_param = False
    assert not made(request).explains
