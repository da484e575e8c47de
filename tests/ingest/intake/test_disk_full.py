"""MongoDB's disk fills up: refusals that say so in time, nothing acknowledged is lost, and recovery without hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, submit
from tests.ingest.intake.disks import SmallDisk, small_disk
from tests.mongods import MongoProcess

S = grpc.StatusCode
MIB = 1 << 20
RESERVE = 150 * MIB
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Room for mongod's journal, and not much more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, 800 * MIB) as made:
        yield made


@pytest.fixture
async def mongod(disk: SmallDisk) -> AsyncIterator[MongoProcess]:
    with MongoProcess(disk.folder, oplog_mib=16) as process:
        await process.until_ready()
        yield process


async def answer(client: Client, size: int = 100) -> pb.SubmitResponse | grpc.aio.AioRpcError:
    try:
        return await client.stub.Submit(submit(data=bytes(size)), timeout=90)  # type: ignore[no-any-return]
    except grpc.aio.AioRpcError as err:
        return err


async def is_taken(client: Client) -> bool:
    return isinstance(await answer(client), pb.SubmitResponse)


async def until_all_have_ended(client: Client, mesh: FakeMesh, job_ids: list[str]) -> None:
    """Every acknowledged job succeeds, with the one result that the store has of it."""
    for job_id in job_ids:
        assert (await client.ended(job_id, within_s=120)).state == pb.JOB_STATE_SUCCEEDED
        assert job_id in mesh.store.results


async def test_a_disk_that_is_nearly_full_takes_no_more_and_ends_what_it_has(
    disk: SmallDisk, mongod: MongoProcess, own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    ingest = start_ingest(mongo=mongod.uri, min_free_disk_bytes=RESERVE)
    await ingest.until_ready()
    client = Client(ingest.address)
    await own_mesh.down()  # So that jobs wait.
    accepted = [(await client.submit(data=bytes(1_000))).job.id for _ in range(50)]
    disk.fill(left=RESERVE - 20 * MIB)

    async def is_refused() -> bool:
        return isinstance(await answer(client), grpc.aio.AioRpcError)

    await until(is_refused, "a refusal")
    refused = await answer(client)
    assert isinstance(refused, grpc.aio.AioRpcError)
    assert refused.code() is S.RESOURCE_EXHAUSTED
    assert "MongoDB's disk has" in (refused.details() or "")
    assert "free some space" in (refused.details() or "")
    assert int(dict(refused.trailing_metadata() or ())["retry-after-ms"]) > 0

    async def held() -> AsyncIterator[pb.SubmitStreamRequest]:
        yield pb.SubmitStreamRequest(sequence=1, submit=submit())

    stream = client.stub.SubmitStream(held(), timeout=100)
    acknowledgement = asyncio.create_task(anext(aiter(stream)))
    await own_mesh.up()
    await until_all_have_ended(client, own_mesh, accepted)  # While nothing more is taken.
    assert await is_refused()
    disk.clear()
    await until(lambda: is_taken(client), "submits taken again")
    # The stream was not refused: it waited. (On a machine so slow that half a minute has passed, it says so.)
    assert (await acknowledgement).code in (0, S.RESOURCE_EXHAUSTED.value[0])
    assert ingest.is_running()
    await client.channel.close()


async def test_a_disk_that_is_full_to_the_last_byte_loses_nothing(
    disk: SmallDisk, mongod: MongoProcess, own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    """Without a reserve mongod runs into the wall. Whoever keeps it running starts it again; nobody touches ingest."""
    ingest = start_ingest(mongo=mongod.uri, min_free_disk_bytes=0)
    await ingest.until_ready()
    client = Client(ingest.address)
    await own_mesh.down()
    disk.fill(left=24 * MIB)
    accepted: list[str] = []
    refused: list[grpc.aio.AioRpcError] = []

    async def is_full() -> bool:
        for outcome in await asyncio.gather(*(answer(client, 200_000) for _ in range(16))):
            if isinstance(outcome, grpc.aio.AioRpcError):
                refused.append(outcome)
            else:
                accepted.append(outcome.job.id)
        return len(refused) >= 16

    await until(is_full, "the disk full", within_s=120)
    assert accepted
    for error in refused:
        assert error.code() in (S.UNAVAILABLE, S.RESOURCE_EXHAUSTED), error
        words = error.details() or ""
        assert "MongoDB" in words or "no answer for 10 s" in words, words
    disk.clear()
    if not mongod.is_running():
        mongod.start()
    await mongod.until_ready()
    await own_mesh.up()
    await until(lambda: is_taken(client), "submits taken again", within_s=60)
    await until_all_have_ended(client, own_mesh, accepted)
    assert ingest.is_running()
    await client.channel.close()
