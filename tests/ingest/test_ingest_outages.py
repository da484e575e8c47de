"""MongoDB, the mesh, the store or etcd away, at the start or later: it stays up, says so, and recovers by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import PATIENCE_S, until
from tests.free_ports import free_port
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, submit
from tests.mongods import MongoProcess

S = grpc.StatusCode


@pytest.fixture(scope="module")
def one_mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoProcess]:
    with MongoProcess(tmp_path_factory.mktemp("mongod")) as process:
        yield process


@pytest.fixture
async def mongod(one_mongod: MongoProcess) -> MongoProcess:
    """A mongod that is ready, whatever the test before this one has done to it."""
    if not one_mongod.is_running():
        one_mongod.start()
    one_mongod.thaw()
    await one_mongod.until_ready()
    return one_mongod


async def refusal(client: Client, request: pb.SubmitRequest | None = None) -> grpc.StatusCode:
    """Return the status code of a submit that is rejected, in bounded time."""
    with pytest.raises(grpc.aio.AioRpcError) as call:
        await client.stub.Submit(request or submit(), timeout=30)
    return call.value.code()


async def health(client: Client) -> int:
    answer = await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    return int(answer.status)


async def answers(client: Client) -> bool:
    try:
        await client.stub.Submit(submit(), timeout=30)
    except grpc.aio.AioRpcError as err:
        # After an outage, a submit is rejected until the writes that waited are done.
        if err.code() not in (S.UNAVAILABLE, S.RESOURCE_EXHAUSTED):
            raise
        return False
    return True


async def test_everything_away_at_the_start(mongod: MongoProcess, start_ingest: StartIngest, run_dir: Path) -> None:
    mongod.kill()
    ingest = start_ingest(mongo=mongod.uri, etcd=f"127.0.0.1:{free_port()}")
    client = Client(ingest.address)
    await asyncio.wait_for(client.channel.channel_ready(), 30)
    assert await health(client) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await refusal(client) is S.UNAVAILABLE
    mongod.start()
    await mongod.until_ready()
    await ingest.until_ready()
    accepted = await client.submit()
    fake = FakeMesh(f"unix:{run_dir}/outbound.sock")
    await fake.up()
    job = await client.ended(accepted.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    await fake.down()
    await client.channel.close()


async def test_a_database_that_hangs_comes_back_and_what_nobody_heard_of_runs_once(
    mongod: MongoProcess, own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    ingest = start_ingest(mongo=mongod.uri)
    await ingest.until_ready()
    client = Client(ingest.address)
    await client.ended((await client.submit()).job.id)
    once = submit(request_id="once", idempotency_key="k", retry=pb.RetryPolicy(max_attempts=1))
    mongod.freeze()
    # The write that would also claim it hangs: it is done, or not, once mongod goes on.
    unheard = asyncio.create_task(refusal(client, once))
    await asyncio.sleep(0.2)
    refused = await asyncio.gather(unheard, *(refusal(client) for _ in range(20)))
    assert set(refused) == {S.UNAVAILABLE}
    mongod.thaw()
    await until(lambda: answers(client), "submits taken again")
    accepted = await client.submit()
    assert (await client.ended(accepted.job.id)).state == pb.JOB_STATE_SUCCEEDED
    again = await client.stub.Submit(once, timeout=20)
    job = await client.ended(again.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    assert own_mesh.infer.calls["once"] == 1
    await client.channel.close()


async def test_a_database_that_is_killed_under_a_watch_and_a_running_job(
    mongod: MongoProcess, own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    runs, may_answer = asyncio.Event(), asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        runs.set()
        await may_answer.wait()
        return await echo(request, context)

    own_mesh.infer.model = waits
    ingest = start_ingest(mongo=mongod.uri)
    await ingest.until_ready()
    client = Client(ingest.address)
    accepted = await client.submit()
    watch = client.stub.WatchJob(pb.WatchJobRequest(id=accepted.job.id), timeout=90)
    # The watch has begun: until then, an unavailable database ends it.
    await watch.read()
    await asyncio.wait_for(runs.wait(), 60)
    mongod.kill()
    may_answer.set()
    await until(lambda: accepted.job.id in own_mesh.store.results, "the result recorded")
    mongod.start()
    await mongod.until_ready()
    job = pb.Job()
    while (response := await watch.read()) is not grpc.aio.EOF:
        job = response.job
    assert job.state == pb.JOB_STATE_SUCCEEDED
    assert ingest.is_running()
    await client.channel.close()


async def test_it_stops_in_order_while_its_database_is_gone(
    mongod: MongoProcess, own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    ingest = start_ingest(mongo=mongod.uri)
    await ingest.until_ready()
    client = Client(ingest.address)
    await client.submit()
    mongod.kill()
    await client.channel.close()
    await asyncio.sleep(1)  # Now everything that it does waits for MongoDB.
    assert await asyncio.to_thread(ingest.terminate, 60) == 0


async def test_a_mesh_that_goes_away_costs_no_attempts(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    ingest = start_ingest()
    await ingest.until_ready()
    client = Client(ingest.address)
    await own_mesh.down()
    accepted = [await client.submit(retry=pb.RetryPolicy(max_attempts=1)) for _ in range(200)]

    async def was_refused() -> bool:
        return (await client.get(accepted[0].job.id)).last_code == S.UNAVAILABLE.value[0]

    await until(was_refused, "a refusal")
    await own_mesh.up()
    for answer in accepted:
        job = await client.ended(answer.job.id)
        assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    await client.channel.close()


def test_a_wrong_setting_is_named(start_ingest: StartIngest) -> None:
    for wrong, says in (({"mongo": "redis://x"}, "SHOAL_INGEST_MONGO"), ({"renew_ms": 4_000}, "renew_ms")):
        ingest = start_ingest(7, **wrong)
        assert ingest.wait(PATIENCE_S) == 2
        assert says in ingest.log.read_text()


async def test_a_stream_stops_its_producer_while_the_database_hangs(
    mongod: MongoProcess, own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    ingest = start_ingest(mongo=mongod.uri, stream_items=20)
    await ingest.until_ready()
    client, sent = Client(ingest.address), 0

    async def endless() -> AsyncIterator[pb.SubmitStreamRequest]:
        nonlocal sent
        while sent < 400:
            sent += 1
            yield pb.SubmitStreamRequest(sequence=sent, submit=submit(data=b"x" * (256 << 10)))

    mongod.freeze()
    call = client.stub.SubmitStream(endless(), timeout=90)
    await until(lambda: sent > 20, "the window of the stream is full")
    seen = -1
    while sent != seen:
        seen = sent
        await asyncio.sleep(0.3)
    assert sent < 100  # 20 items taken, and what HTTP/2's windows hold.
    mongod.thaw()
    answers = [answer async for answer in call]
    assert [answer.sequence for answer in answers] == list(range(1, 401))
    assert all(answer.job_id or answer.code == S.UNAVAILABLE.value[0] for answer in answers)
    assert all(answer.job_id for answer in answers[-300:])
    await client.channel.close()
