"""Two instances under load, killed again and again: every acknowledged job ends with exactly one result."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from pymongo import AsyncMongoClient

from services.ingest.job import End, Outcome, state_of
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.breakable import Process, until
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, mesh_at, submit
from tests.long_form import by_form

S = grpc.StatusCode
JOBS = by_form(200, 300)
# The third one kills both instances.
KILLS = by_form(3, 5)
LEASE = {"lease_ms": 2_000, "renew_ms": 500}
# Recovery within the patience of a test; what is tested does not depend on it.
RETRY = pb.RetryPolicy(max_attempts=100, initial_backoff=Duration(nanos=1_000_000))


async def slow(request: Any, context: Any) -> Any:
    await asyncio.sleep(0.02)
    return await echo(request, context)


async def produce(clients: list[Client], n: int) -> str:
    """Submits job `n` until somebody acknowledges it."""
    request = submit(request_id=f"{n}", data=f"{n}".encode(), idempotency_key=f"{n}", retry=RETRY)
    while True:
        try:
            response = await random.choice(clients).stub.Submit(request, timeout=5)
        except grpc.aio.AioRpcError as err:
            if err.code() not in (S.UNAVAILABLE, S.DEADLINE_EXCEEDED, S.CANCELLED):
                raise
            await asyncio.sleep(0.05)
        else:
            job_id: str = response.job.id
            return job_id


async def load(clients: list[Client]) -> dict[str, int]:
    """All jobs, from 10 producers: acknowledged ids, and which job each is."""
    numbers = iter(range(JOBS))
    acknowledged: dict[str, int] = {}

    async def producer() -> None:
        for n in numbers:
            acknowledged[await produce(clients, n)] = n

    await asyncio.gather(*(producer() for _ in range(10)))
    return acknowledged


async def ledger(mongo_uri: str, database: str, acknowledged: dict[str, int], results: dict[str, Any]) -> None:
    """Compares every acknowledged job with every result."""
    assert sorted(acknowledged.values()) == list(range(JOBS))
    assert acknowledged.keys() <= results.keys()
    for job_id, n in acknowledged.items():
        assert list(results[job_id].response.raw_output_contents) == [f"{n}".encode()], "another job's result"
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        documents = await mongo[database]["jobs"].find().to_list()
    assert {document["_id"] for document in documents} == results.keys()
    for document in documents:
        result = results[document["_id"]]
        assert document["state"] == state_of(End(Outcome(result.outcome), result.code))
        assert not {"lease", "due_at"} & document.keys()


async def kill_and_restart(ingests: list[IngestProcess], is_done: asyncio.Event, count: Any) -> None:
    """Kills one or both, each time that some more results are there."""
    for kill in range(KILLS):
        before = count()
        await until(lambda seen=before: count() >= seen + 20 or is_done.is_set(), "20 more results")
        for victim in ingests if kill == 2 else [ingests[kill % 2]]:
            victim.kill()
            victim.start()


async def settled(mongo_uri: str, database: str) -> None:
    """Waits until no job is waiting or held: then nothing more happens."""
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:

        async def is_so() -> bool:
            live = {"$or": [{"due_at": {"$exists": True}}, {"lease": {"$exists": True}}]}
            return not await mongo[database]["jobs"].count_documents(live)

        await until(is_so, "all jobs ended", within_s=60)


async def test_killed_between_acknowledgement_and_dispatch(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    await own_mesh.down()
    ingest = start_ingest()
    await ingest.until_ready()
    client = Client(ingest.address)
    accepted = [await client.submit(request_id=f"{n}") for n in range(20)]
    ingest.kill()
    await own_mesh.up()
    ingest.start()
    await ingest.until_ready()
    for answer in accepted:
        job = await client.ended(answer.job.id)
        assert job.state == pb.JOB_STATE_SUCCEEDED
    assert own_mesh.store.results.keys() == {answer.job.id for answer in accepted}
    await client.channel.close()


async def test_killed_during_an_attempt(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    runs = asyncio.Event()

    async def hangs_once(request: Any, context: Any) -> Any:
        if not runs.is_set():
            runs.set()
            await asyncio.Event().wait()
        return await echo(request, context)

    own_mesh.infer.model = hangs_once
    first, second = start_ingest(0, **LEASE), start_ingest(1, **LEASE)
    await first.until_ready()
    await second.until_ready()
    one, other = Client(first.address), Client(second.address)
    accepted = await one.submit()
    await asyncio.wait_for(runs.wait(), 60)
    while (await one.get(accepted.job.id)).transitions[-1].state != pb.JOB_STATE_RUNNING:
        await asyncio.sleep(0.01)
    holder, client = (first, other) if (await one.get(accepted.job.id)).transitions[-1].instance.endswith("0") else (
        second, one)  # fmt: skip
    holder.kill()
    job = await client.ended(accepted.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 2)
    assert "lapsed during attempt 1: it died or was cut off" in job.transitions[2].reason
    for channel in (one.channel, other.channel):
        await channel.close()


async def test_killed_between_the_result_and_the_state(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    recorded = asyncio.Event()

    async def records_and_hangs(request: store_pb2.PutResultsRequest, context: Any) -> None:
        if not recorded.is_set():
            for result in request.results:
                own_mesh.store.results.setdefault(result.job_id, result)
            recorded.set()
            await asyncio.Event().wait()

    own_mesh.store.before = records_and_hangs
    ingest = start_ingest(**LEASE)
    await ingest.until_ready()
    client = Client(ingest.address)
    accepted = await client.submit(request_id="once")
    await asyncio.wait_for(recorded.wait(), 60)
    ingest.kill()
    ingest.start()
    await ingest.until_ready()
    job = await client.ended(accepted.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    assert own_mesh.infer.calls["once"] == 1  # The store was asked first: it does not run again.
    await client.channel.close()


async def test_a_frozen_worker_overwrites_nothing(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    runs, may_answer = asyncio.Event(), asyncio.Event()

    async def answers_late_the_first_time(request: Any, context: Any) -> Any:
        if not runs.is_set():
            runs.set()
            await may_answer.wait()
            request.raw_input_contents[0] = b"late"
        return await echo(request, context)

    own_mesh.infer.model = answers_late_the_first_time
    slow_one = start_ingest(0, **LEASE)
    await slow_one.until_ready()
    one = Client(slow_one.address)
    accepted = await one.submit(data=b"in time")
    await asyncio.wait_for(runs.wait(), 60)
    other_one = start_ingest(1, **LEASE)
    await other_one.until_ready()
    slow_one.freeze()
    other = Client(other_one.address)
    job = await other.ended(accepted.job.id)
    assert job.state == pb.JOB_STATE_SUCCEEDED
    may_answer.set()
    slow_one.thaw()
    await slow_one.until_ready()
    assert (await one.submit()).job.id
    assert await one.get(accepted.job.id) == job
    assert list(own_mesh.store.results[job.id].response.raw_output_contents) == [b"in time"]
    for channel in (one.channel, other.channel):
        await channel.close()


async def test_a_stop_finishes_what_it_can_and_releases_the_rest(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    runs: set[str] = set()
    may_answer = asyncio.Event()

    async def model(request: Any, context: Any) -> Any:
        first_time = request.id not in runs
        runs.add(request.id)
        if request.id == "finishes":
            await may_answer.wait()
        elif request.id == "hangs" and first_time:
            await asyncio.Event().wait()
        return await echo(request, context)

    own_mesh.infer.model = model
    first = start_ingest(0, drain_ms=5_000)
    await first.until_ready()
    one = Client(first.address)
    finishes = await one.submit(request_id="finishes")
    hangs = await one.submit(request_id="hangs", retry=pb.RetryPolicy(max_attempts=2))
    await until(lambda: runs == {"finishes", "hangs"}, "both running")
    stopping = asyncio.create_task(asyncio.to_thread(first.terminate, 30))
    may_answer.set()
    assert await stopping == 0
    assert own_mesh.store.results.keys() == {finishes.job.id}
    second = start_ingest(1)
    await second.until_ready()
    other = Client(second.address)
    job = await other.ended(hangs.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    assert job.transitions[2].reason == "local/ingest-0 stops: the attempt is not counted"
    for channel in (one.channel, other.channel):
        await channel.close()


class RealStore:
    """Hands store calls on to a real store."""

    def __init__(self, stub: store_pb2_grpc.StoreServiceStub) -> None:
        self._stub = stub

    async def PutResults(self, request: Any, context: Any) -> Any:
        return await self._handed_on(self._stub.PutResults, request, context)

    async def QueryResults(self, request: Any, context: Any) -> Any:
        return await self._handed_on(self._stub.QueryResults, request, context)

    async def ListUsage(self, request: Any, context: Any) -> Any:
        return await self._handed_on(self._stub.ListUsage, request, context)

    async def _handed_on(self, call: Any, request: Any, context: Any) -> Any:
        try:
            return await call(request, timeout=30)
        except grpc.aio.AioRpcError as err:
            await context.abort(err.code(), err.details() or "", err.trailing_metadata() or ())


@pytest.fixture
async def real_store(
    run_dir: Path, tmp_path: Path, mongo_uri: str, mongo_database: str
) -> AsyncIterator[store_pb2_grpc.StoreServiceStub]:
    address = f"unix:{run_dir}/store-0.sock"
    env = {
        "SHOAL_STORE_INSTANCE": "store-0",
        "SHOAL_STORE_LISTEN": address,
        "SHOAL_STORE_MONGO": mongo_uri,
        "SHOAL_STORE_DATABASE": mongo_database,
        "SHOAL_STORE_BLOBS": f"file://{tmp_path}/blobs",
    }
    with Process([sys.executable, "-m", "services.store"], run_dir / "store-0.log", env):
        async with grpc.aio.insecure_channel(address) as channel:
            yield store_pb2_grpc.StoreServiceStub(channel)


@pytest.mark.timeout(240)
async def test_killed_again_and_again_with_the_real_store(
    run_dir: Path,
    real_store: store_pb2_grpc.StoreServiceStub,
    start_ingest: StartIngest,
    mongo_uri: str,
    mongo_database: str,
) -> None:
    async with mesh_at(run_dir, RealStore(real_store)) as mesh:
        mesh.infer.model = slow
        ingests = [start_ingest(n, **LEASE) for n in range(2)]
        clients = [Client(ingest.address) for ingest in ingests]
        for ingest in ingests:
            await ingest.until_ready()
        is_done = asyncio.Event()
        answered = mesh.infer.calls
        killing = asyncio.create_task(kill_and_restart(ingests, is_done, lambda: len(answered)))
        acknowledged = await load(clients)
        is_done.set()
        await killing
        await settled(mongo_uri, mongo_database)
        async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
            recorded = [each["_id"] async for each in mongo[mongo_database]["results"].find({}, {"_id": 1})]
        results = {}
        for job_id in recorded:
            response = await real_store.GetResult(store_pb2.GetResultRequest(job_id=job_id), timeout=30)
            results[job_id] = response.result
        await ledger(mongo_uri, mongo_database, acknowledged, results)
        for client in clients:
            await client.channel.close()
