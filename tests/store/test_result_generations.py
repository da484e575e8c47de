"""A requeued job's result takes the place of its earlier failure, and of nothing else, whoever writes when."""

from __future__ import annotations

import asyncio
from itertools import permutations

import pytest
from grpc import StatusCode

from shoal.inference.v2 import inference_pb2 as oip
from shoal.store.v1 import store_pb2 as pb
from tests.store.conftest import Store, refused

pytestmark = pytest.mark.mongo

OK, FAILED = pb.Result.OUTCOME_SUCCEEDED, pb.Result.OUTCOME_FAILED


def answered(job_id: str, generation: int, *, size: int = 3, lease: str = "") -> pb.Result:
    response = oip.ModelInferResponse(model_name="m", raw_output_contents=[bytes([generation]) * size])
    return pb.Result(job_id=job_id, outcome=OK, response=response, generation=generation, lease_id=lease)


def failed(job_id: str, generation: int, message: str = "boom") -> pb.Result:
    return pb.Result(job_id=job_id, outcome=FAILED, code=13, message=message, generation=generation)


async def put(store: Store, *results: pb.Result) -> list[tuple[bool, int]]:
    """Of each: whether it was recorded, and the generation of what stands."""
    answer = await store.stub.PutResults(pb.PutResultsRequest(results=results))
    return [(entry.recorded, entry.standing.generation) for entry in answer.entries]


async def get(store: Store, job_id: str) -> pb.Result:
    return (await store.stub.GetResult(pb.GetResultRequest(job_id=job_id))).result


async def test_a_failure_is_succeeded_by_the_next_generation(store: Store) -> None:
    assert await put(store, failed("a", 1)) == [(True, 0)]
    assert await put(store, answered("a", 2)) == [(True, 2)]
    standing = await get(store, "a")
    assert (standing.outcome, standing.generation, standing.code, standing.message) == (OK, 2, 0, "")
    assert list(standing.response.raw_output_contents) == [b"\2\2\2"]


async def test_what_is_late_changes_nothing(store: Store) -> None:
    await put(store, failed("a", 1))
    await put(store, failed("a", 2, "second"))
    assert await put(store, answered("a", 1)) == [(False, 2)]
    assert await put(store, answered("a", 2)) == [(False, 2)]
    assert (await get(store, "a")).message == "second"
    assert await put(store, answered("a", 3)) == [(True, 3)]
    assert await put(store, failed("a", 3), answered("b", 1)) == [(False, 3), (True, 0)]


@pytest.mark.parametrize("outcome", [OK, pb.Result.OUTCOME_CANCELLED, pb.Result.OUTCOME_EXPIRED])
async def test_what_is_no_failure_stands_for_ever(store: Store, outcome: pb.Result.Outcome) -> None:
    first = pb.Result(job_id="a", outcome=outcome, message="first")
    await put(store, first)
    assert await put(store, answered("a", 2)) == [(False, 0)]
    assert (await get(store, "a")).message == "first"


async def test_in_any_order_the_newest_generation_stands(store: Store) -> None:
    for name, order in enumerate(permutations([1, 2, 3])):
        for generation in order:
            await put(store, failed(f"{name}", generation, f"{generation}"))
        assert (await get(store, f"{name}")).message == "3"


async def test_of_many_at_once_one_stands_and_only_it_is_told_so(store: Store) -> None:
    await put(store, failed("a", 1))
    writers = [answered("a", 2, lease=f"lease-{n}") for n in range(20)] + [failed("a", 1, f"{n}") for n in range(5)]
    told = await asyncio.gather(*(put(store, result) for result in writers))
    winners = [writer for writer, [(recorded, _)] in zip(writers, told, strict=True) if recorded]
    assert len(winners) == 1
    assert (await get(store, "a")).lease_id == winners[0].lease_id


async def test_a_large_answer_of_a_later_generation(store: Store) -> None:
    await put(store, failed("a", 1))
    assert await put(store, answered("a", 2, size=2 << 20)) == [(True, 2)]
    assert await put(store, answered("a", 2, size=2 << 20)) == [(False, 2)]
    assert len((await get(store, "a")).response.raw_output_contents[0]) == 2 << 20


async def test_watches_and_queries_see_the_one_that_stands(store: Store) -> None:
    call = store.stub.WatchResults(pb.WatchResultsRequest())
    await call.read()
    await put(store, failed("a", 1))
    await put(store, answered("a", 2))
    assert [(await call.read()).result.generation for _ in range(2)] == [0, 2]
    call.cancel()
    found = (await store.stub.QueryResults(pb.QueryResultsRequest(job_ids=["a"]))).results
    assert [result.generation for result in found] == [2]
    assert not (await store.stub.QueryResults(pb.QueryResultsRequest(outcome=FAILED))).results


async def test_a_generation_has_bounds(store: Store) -> None:
    for wrong in (-1, 1_000_001):
        call = store.stub.PutResults(pb.PutResultsRequest(results=[failed("a", wrong)]))
        said = await refused(call, StatusCode.INVALID_ARGUMENT)
        assert f"results[0].generation: expected 0 to 1000000, got {wrong}" in said
