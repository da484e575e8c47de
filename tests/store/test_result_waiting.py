"""GetResult waits for a result that is not there yet: one that is recorded here, or at another instance."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from mesh.mongo import connect as mongo_connect
from mesh.rpc.channel import connect
from services.ingest.ulid import Ulids
from services.store.config import StoreConfig
from services.store.results import results, waiting
from services.store.results.waiting import Waiters, is_young
from shoal.errors import ResourceExhausted, Unavailable
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc
from tests.store.conftest import Store, refused, running_store, store_config
from tests.store.test_result_rpc import put, result


def waits(store: Store, job_id: str, seconds: float = 5.0) -> Any:
    wait = Duration()
    wait.FromNanoseconds(int(seconds * 1e9))
    return store.stub.GetResult(pb.GetResultRequest(job_id=job_id, wait=wait))


@pytest.mark.mongo
async def test_results_come_to_whoever_waits_for_them(store: Store) -> None:
    there = result("there")
    await put(store, there)
    assert (await waits(store, "there")).result.response == there.response
    calls = [asyncio.ensure_future(waits(store, job)) for job in ("a", "a", "b", "nobody's")]
    await refused(waits(store, "c", 0.05), StatusCode.NOT_FOUND, "no result (yet)")  # The others wait by then.
    a, b = result("a"), result("b", pb.Result.OUTCOME_FAILED, code=13, message="boom")
    await put(store, a, b)
    answers = [(await call).result for call in calls[:3]]
    assert [each.response for each in answers[:2]] == [a.response] * 2
    assert (answers[2].message, answers[0].recorded_at.seconds > 0) == ("boom", True)
    assert not calls[3].done()
    calls[3].cancel()


@pytest.mark.mongo
async def test_what_another_instance_records_is_seen(
    store: Store, config: StoreConfig, mongo_uri: str, run_dir: Path, tmp_path: Path
) -> None:
    beside = store_config(mongo_uri, config.database, run_dir / "store-1.sock", tmp_path / "blobs", instance="store-1")
    async with running_store(beside) as other:
        call = asyncio.ensure_future(waits(store, "elsewhere"))
        await refused(waits(store, "c", 0.05), StatusCode.NOT_FOUND)
        recorded = result("elsewhere")
        await put(other, recorded)
        assert (await call).result.response == recorded.response


def young_id() -> str:
    """The id of a job that comes just now."""
    return Ulids(lambda: time.time_ns() // 1_000_000).new()


@pytest.mark.mongo
async def test_for_the_result_of_a_job_that_just_came_nobody_looks_at_first(
    store: Store, config: StoreConfig, mongo_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine takes longer than the tenth of a second in which a job is young.
    monkeypatch.setattr(results, "_SOON_S", 5.0)
    monkeypatch.setattr(waiting, "_YOUNG_MS", 30_000)
    async with mongo_connect(mongo_uri) as client:
        database = client[config.database]
        await database.command("profile", 2)
        job = young_id()
        call = asyncio.ensure_future(waits(store, job))
        await refused(waits(store, "old", 0.05), StatusCode.NOT_FOUND)  # The other one waits by then.
        recorded = result(job)
        await put(store, recorded)
        assert (await call).result.response == recorded.response
        await database.command("profile", 0)
        # Other collections are queried too meanwhile, not all of them by `_id`.
        queries = database["system.profile"].find({"op": "query", "ns": database["results"].full_name})
        looks = [found["command"]["filter"].get("_id") async for found in queries]
    assert "old" in looks
    assert job not in looks


@pytest.mark.mongo
async def test_the_result_of_a_job_that_just_came_may_be_there_already(store: Store) -> None:
    recorded = result(young_id())
    await put(store, recorded)
    assert (await waits(store, recorded.job_id)).result.response == recorded.response
    await refused(waits(store, young_id(), 0.0), StatusCode.NOT_FOUND, "no result (yet)")
    await refused(waits(store, young_id(), 0.01), StatusCode.NOT_FOUND, "no result (yet)")
    call = asyncio.ensure_future(waits(store, job := young_id()))
    await asyncio.sleep(0.2)
    await put(store, later := result(job))
    assert (await call).result.response == later.response


@pytest.mark.parametrize(
    ("ahead_ms", "young"), [(0, True), (99, True), (-99, True), (101, False), (-101, False), (3_600_000, False)]
)
def test_how_old_a_job_is_its_id_says(ahead_ms: int, young: bool) -> None:
    now = datetime(2026, 11, 27, 12, 0, 0, 123_000, UTC)
    made = Ulids(lambda: int(now.timestamp() * 1000) + ahead_ms).new()
    assert is_young(made, now) is young


@pytest.mark.parametrize("job_id", ["j", "x" * 26, "!" * 26, "é" * 26, "01J" + "-" * 23, "IIIIIIIIIIIIIIIIIIIIIIIIII"])
def test_of_other_ids_it_is_not_known(job_id: str) -> None:
    assert not is_young(job_id, datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC))


@pytest.mark.mongo
@pytest.mark.parametrize(
    "wait", [Duration(seconds=-1), Duration(seconds=6), Duration(seconds=5, nanos=1), Duration(nanos=-1)], ids=str
)
async def test_waits_that_are_none(store: Store, wait: Duration) -> None:
    call = store.stub.GetResult(pb.GetResultRequest(job_id="j", wait=wait))
    await refused(call, StatusCode.INVALID_ARGUMENT, "wait", "0 to 5 s")


@pytest.mark.mongo
async def test_a_stop_does_not_wait_for_those_who_wait(config: StoreConfig) -> None:
    async with connect(config.listen) as channel:
        async with running_store(config) as store:
            call = asyncio.ensure_future(
                waits(Store(config, store_pb2_grpc.StoreServiceStub(channel), channel), "never")
            )
            await refused(waits(store, "c", 0.05), StatusCode.NOT_FOUND)
        await refused(call, StatusCode.UNAVAILABLE, "call again")


async def test_who_waits_is_bounded_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_MOST", 2)
    calls = Waiters(cast(Any, None))
    one, two = calls.begin("a"), calls.begin("a")
    with pytest.raises(ResourceExhausted, match="2 calls wait"):
        calls.begin("b")
    calls.end("a", one)
    calls.notify([{"_id": "b", "tenant": ""}, {"_id": "a", "tenant": "", "state": 1}])
    assert two.result()["state"] == 1
    calls.end("a", two)
    calls.notify([{"_id": "a", "tenant": ""}])
    three = calls.begin("b")
    calls.stop()
    with pytest.raises(Unavailable, match="call again"):
        three.result()
    with pytest.raises(Unavailable, match="another one"):
        calls.begin("b")
    calls.end("b", three)
    assert calls._futures == {}
