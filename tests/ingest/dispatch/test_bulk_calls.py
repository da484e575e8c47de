"""What goes into one call, and how many jobs of a model may be in calls at once."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.dispatch.bulk_calls import (
    BULK_BYTES,
    BULK_JOBS,
    LONE_BYTES,
    ConcurrencyLimit,
    next_bulk,
    runs_alone,
)
from services.ingest.job import Job
from shoal.errors import Code
from shoal.inference.v2 import inference_pb2 as oip
from tests.ingest.making import job

STEP = oip.ModelInferRequest(model_name="m", parameters={"sequence_id": oip.InferParameter(int64_param=7)})


@pytest.mark.parametrize(
    "loner",
    [
        job(is_apart=True, request=None),
        job(request=None),
        job(request=bytes(LONE_BYTES + 1)),
        job(request=STEP.SerializeToString()),
        job(attempts=2, last_code=int(Code.UNAVAILABLE)),
        job(attempts=2, last_code=int(Code.ABORTED)),
        job(attempts=2, refusals=1, last_code=int(Code.RESOURCE_EXHAUSTED)),
    ],
    ids=["apart", "gone", "large", "step-of-a-sequence", "its-instance-died", "its-holder-died", "refused-since"],
)
def test_what_goes_alone(loner: Job) -> None:
    assert runs_alone(loner)
    first, last = job(), job()
    waiting = deque([first, loner, last])
    assert [next_bulk(waiting, 10) for _ in range(3)] == [[first], [loner], [last]]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attempts": 1, "last_code": 14},
        {"attempts": 3, "last_code": 13},
        {"attempts": 1, "refusals": 2, "last_code": 8},
    ],
    ids=["new", "first", "other", "refused"],
)
def test_what_goes_with_others(fields: dict[str, int]) -> None:
    assert not runs_alone(job(**fields))


@given(st.lists(st.integers(1, LONE_BYTES + 10), min_size=1, max_size=60), st.integers(1, 70))
def test_every_job_goes_once_in_its_order_in_calls_that_are_small(sizes: list[int], most: int) -> None:
    jobs = [job(request=bytes(size)) for size in sizes]
    waiting, calls = deque(jobs), list[list[Job]]()
    while waiting:
        calls.append(next_bulk(waiting, most))
    assert [each for call in calls for each in call] == jobs
    for call in calls:
        assert 1 <= len(call) <= min(most, BULK_JOBS)
        assert len(call) == 1 or sum(len(each.request or b"") for each in call) <= BULK_BYTES
        assert len(call) == 1 or not any(map(runs_alone, call))


def test_a_pace_grows_with_answers_and_halves_once_for_a_slow_round() -> None:
    pace = ConcurrencyLimit(256, soon_s=1)
    assert pace.limit == 32
    pace.record_results(32, 0.1, 100)
    assert pace.limit == 64
    for _ in range(100):
        pace.record_results(64, 0.1, 101)
    assert pace.limit == 256
    for late in range(5):
        pace.record_results(50, 1.1 + late / 10, 120 + late / 10)
    assert pace.limit == 128
    pace.record_results(50, 1.2, 121.1)
    assert pace.limit == 64
    for n in range(20):
        pace.record_results(1, 1.2, 200 + 2 * n)
    assert pace.limit == 1
    pace.record_results(1, 0.1, 1_000)
    assert pace.limit == 2
    assert ConcurrencyLimit(3, soon_s=1).limit == 3


def test_a_model_that_needs_long_at_best_is_not_starved() -> None:
    pace = ConcurrencyLimit(256, soon_s=1)
    for n in range(20):
        pace.record_results(32, 5.0 + n % 3, 10.0 * n)
    assert pace.limit == 256
    pace.record_results(32, 15.1, 300)
    assert pace.limit == 128
