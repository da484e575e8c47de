"""Kinesis: shards that split, instances that share them, streams that are made anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError
from pymongo import AsyncMongoClient

from mesh.mongo_clock import utc_now
from services.ingest.connectors import envelope
from services.ingest.connectors import kinesis as kinesis_module
from services.ingest.connectors.checkpoints import CHECKPOINTS, CheckpointRepository
from services.ingest.connectors.kinesis import Access, KinesisSink, KinesisSource
from services.ingest.connectors.message import Message, Outgoing
from shoal.errors import InvalidArgument, Unavailable
from tests.breakable import until
from tests.ingest.connectors.kinesises import REGION, Kinesis, Moto, aggregate

pytestmark = [pytest.mark.mongo]
LEASE_MS = 1_000


class Reader:
    """A source that is read by a task, which settles what it is told to."""

    def __init__(self, moto: Moto, stream: str, collection: Any, me: str, start: str = "earliest") -> None:
        access = Access(stream, REGION, moto.endpoint)
        self.source = KinesisSource(
            "c", access, collection, me=me, clock=utc_now, start=start, lease_ms=LEASE_MS, poll_ms=20
        )
        self.got: list[Message] = []
        self.settles = True

    async def run(self) -> None:
        async with self.source:
            while True:
                for message in await self.source.receive(100):
                    self.got.append(message)
                    if self.settles:
                        self.source.settle(message)

    @property
    def values(self) -> list[bytes]:
        return [message.value for message in self.got]


@pytest.fixture
async def kinesis(moto: Moto, mongo_uri: str, mongo_database: str) -> Kinesis:
    return await Kinesis(moto, mongo_uri, mongo_database).make()


@pytest.fixture
async def collection(mongo_uri: str, mongo_database: str) -> Any:
    async with AsyncMongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
        yield client[mongo_database][CHECKPOINTS]


async def test_a_split_shard_is_read_to_its_end_before_its_children(
    moto: Moto, kinesis: Kinesis, collection: Any
) -> None:
    reader = Reader(moto, kinesis.stream, collection, "x")
    reader.settles = False
    await kinesis.publish([b"%d" % n for n in range(6)])
    client = moto.client()
    shard = sorted(each["ShardId"] for each in client.list_shards(StreamName=kinesis.stream)["Shards"])[0]
    client.split_shard(StreamName=kinesis.stream, ShardToSplit=shard, NewStartingHashKey=str(1 << 126))
    await kinesis.publish([b"%d" % n for n in range(6, 12)])
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(reader.run())
        children = {each[0] for each in kinesis.published[6:]} - {each[0] for each in kinesis.published[:6]}
        assert children, "the stream was not split"
        others = sum(each[0] not in children for each in kinesis.published)
        await until(lambda: len(reader.got) == others, "all but the children's")
        assert not {message.partition.name for message in reader.got} & children
        for message in reader.got:
            reader.source.settle(message)
        reader.settles = True
        await until(lambda: len(reader.got) == 12, "the children's")
        task.cancel()
    assert sorted(reader.values, key=int) == [b"%d" % n for n in range(12)], "each once"


async def test_two_instances_share_the_shards_and_one_takes_over_when_the_other_is_gone(
    moto: Moto, kinesis: Kinesis, collection: Any
) -> None:
    one, two = (Reader(moto, kinesis.stream, collection, name) for name in ("x", "y"))
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(one.run())
        await until(lambda: len(one.source.status().partitions) == 2, "both shards")
        second = tasks.create_task(two.run())
        await until(lambda: [len(each.source.status().partitions) for each in (one, two)] == [1, 1], "a shard each")
        await kinesis.publish([b"%d" % n for n in range(10)])
        await until(lambda: len(one.got) + len(two.got) >= 10, "all")
        first.cancel()
        await until(lambda: len(two.source.status().partitions) == 2, "the other's too")
        await kinesis.publish([b"%d" % n for n in range(10, 20)])
        await until(lambda: len(two.got) >= 15, "the rest")
        second.cancel()
    assert {*one.values, *two.values} == {b"%d" % n for n in range(20)}


async def test_who_goes_on_begins_after_the_last_that_was_settled(
    moto: Moto, kinesis: Kinesis, collection: Any
) -> None:
    await kinesis.publish([b"%d" % n for n in range(10)])
    one = Reader(moto, kinesis.stream, collection, "x")
    one.settles = False
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(one.run())
        await until(lambda: len(one.got) == 10, "all")
        # 0 and 2 are of one shard, in this order; 1 is of the other, whose 3 is not settled.
        for message in one.got:
            if message.value in (b"0", b"2", b"1", b"5"):
                one.source.settle(message)
        task.cancel()
    two = Reader(moto, kinesis.stream, collection, "y")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(two.run())
        await until(lambda: len(two.got) == 7, "what was not settled")
        task.cancel()
    assert {int(value) for value in two.values} == {3, 4, 5, 6, 7, 8, 9}


async def test_a_record_that_holds_many_is_settled_with_the_last_of_them(
    moto: Moto, mongo_uri: str, mongo_database: str, collection: Any
) -> None:
    kinesis = await Kinesis(moto, mongo_uri, mongo_database, shards=1).make()
    pack = aggregate([(f"key-{n}", b"packed %d" % n) for n in range(1_200)])
    await kinesis.publish([b"before", pack, aggregate([]), b"after"])
    one = Reader(moto, kinesis.stream, collection, "x")
    one.settles = False
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(one.run())
        await until(lambda: len(one.got) == 1_202, "all")
        assert one.values == [b"before", *(b"packed %d" % n for n in range(1_200)), b"after"]
        assert [message.key for message in one.got[1:-1]] == [b"key-%d" % n for n in range(1_200)]
        assert len({message.location for message in one.got}) == len(one.got)
        for message in one.got:
            if message.value != b"packed 700":
                one.source.settle(message)
        await until(kinesis.settled, "the first is settled")
        task.cancel()
    assert await kinesis.settled() == 1

    two = Reader(moto, kinesis.stream, collection, "y")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(two.run())
        await until(lambda: len(two.got) == 1_201, "the record of many again, and what follows")

        async def is_settled() -> bool:
            return await kinesis.settled() == 4

        await until(is_settled, "all of them")
        task.cancel()
    # At each delivery the same place, which is in the keys of the jobs.
    assert [message.location for message in two.got] == [message.location for message in one.got[1:]]


async def test_of_many_shards_only_a_few_are_read_ahead(
    moto: Moto, mongo_uri: str, mongo_database: str, collection: Any
) -> None:
    kinesis = await Kinesis(moto, mongo_uri, mongo_database, shards=16).make()
    await asyncio.to_thread(kinesis.publish_to_each, b"x", 20)
    source = Reader(moto, kinesis.stream, collection, "x").source
    async with source:
        counted = source._client = Counted(source._client)
        await until(lambda: len(source._shard_readers) == 16, "all shards are held")
        await until(lambda: counted.pages >= 6, "as many as there is room for")
        await asyncio.sleep(1)
        assert counted.pages == 6
        got: list[Message] = []
        while len(got) < 16 * 20:
            got += await asyncio.wait_for(source.receive(100), 30)
        assert len({message.location for message in got}) == 16 * 20


class Counted:
    """Counts the pages that hold something."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.pages = 0

    async def get_records(self, **about: Any) -> Any:
        page = await self._client.get_records(**about)
        self.pages += bool(page["Records"])
        return page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


async def test_from_latest_only_what_comes_later_is_read(moto: Moto, kinesis: Kinesis, collection: Any) -> None:
    await kinesis.publish([b"old"])
    reader = Reader(moto, kinesis.stream, collection, "x", start="latest")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(reader.run())
        await until(lambda: len(reader.source.status().partitions) == 2, "both shards")

        async def arrives() -> bool:
            await kinesis.publish([b"new", b"new"])
            return bool(reader.got)

        await until(arrives, "a new one", every_s=0.2)
        task.cancel()
    assert b"old" not in reader.values


class Throttled:
    """A client whose reads are refused for a while."""

    def __init__(self, client: Any, *, is_on: bool = True) -> None:
        self._client = client
        self.is_on = is_on
        self.refused = 0
        self.asked: list[str] = []
        """The shards whose reading was begun, by their first iterators."""

    async def get_records(self, **about: Any) -> Any:
        if not self.is_on:
            return await self._client.get_records(**about)
        self.refused += 1
        raise ClientError({"Error": {"Code": "ProvisionedThroughputExceededException"}}, "GetRecords")

    async def get_shard_iterator(self, **about: Any) -> Any:
        found = await self._client.get_shard_iterator(**about)
        if about["ShardId"] not in self.asked:
            self.asked.append(about["ShardId"])
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


async def test_from_latest_a_read_that_is_refused_passes_nothing_over(
    moto: Moto, kinesis: Kinesis, collection: Any
) -> None:
    reader = Reader(moto, kinesis.stream, collection, "x", start="latest")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(reader.run())
        await until(lambda: len(reader.source.status().partitions) == 2, "both shards")
        shard_readers = reader.source._shard_readers
        await until(lambda: all(each.behind_ms is not None for each in shard_readers.values()), "both are read")
        throttled = reader.source._client = Throttled(reader.source._client)
        await until(lambda: throttled.refused >= 2, "reads are refused")
        values = [b"%d" % n for n in range(10)]
        await kinesis.publish(values)
        seen = throttled.refused
        await until(lambda: throttled.refused >= seen + 2, "and again")
        throttled.is_on = False
        await until(lambda: set(values) <= set(reader.values), "all of them")
        task.cancel()
    assert sorted(reader.values) == values


@pytest.mark.parametrize("is_refused", [False, True], ids=["nothing settled", "nothing read"])
async def test_from_latest_who_goes_on_before_the_first_checkpoint_passes_nothing_over(
    moto: Moto, kinesis: Kinesis, collection: Any, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """The first one is gone before it has settled anything, by a kill: it gives nothing back and saves nothing."""
    clients: list[Throttled] = []
    real = kinesis_module._client

    @asynccontextmanager
    async def throttled(access: Access) -> AsyncIterator[Throttled]:
        async with real(access) as client:
            clients.append(Throttled(client, is_on=is_refused))
            yield clients[-1]

    async def nothing(*args: Any, **options: Any) -> None:
        pass

    values = [b"%d" % n for n in range(10)]
    one = Reader(moto, kinesis.stream, collection, "x", start="latest")
    one.settles = False
    with monkeypatch.context() as patch:
        patch.setattr(kinesis_module, "_client", throttled)
        patch.setattr(CheckpointRepository, "release", nothing)
        patch.setattr(CheckpointRepository, "leave", nothing)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(one.run())
            await until(lambda: bool(clients) and len(clients[0].asked) == 2, "both shards are begun")
            await kinesis.publish(values)
            if not is_refused:
                await until(lambda: len(one.got) == 10, "all")
            task.cancel()
    two = Reader(moto, kinesis.stream, collection, "y", start="latest")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(two.run())
        await until(lambda: set(values) <= set(two.values), "what was not settled")
        task.cancel()
    assert sorted(two.values) == values


async def test_where_a_shard_is_begun_is_durable_before_it_is_read(
    moto: Moto, kinesis: Kinesis, collection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the place cannot be written nothing is read; then the place is one before what comes next."""
    is_away, refused = True, 0
    real = CheckpointRepository.record_start

    async def begin(self: CheckpointRepository, shard: str, lease: str, at: datetime) -> bool:
        nonlocal refused
        if is_away:
            refused += 1
            raise Unavailable("MongoDB is away")
        return await real(self, shard, lease, at)

    monkeypatch.setattr(CheckpointRepository, "record_start", begin)
    monkeypatch.setattr(kinesis_module, "_BACKOFF_S", 0.05)
    reader = Reader(moto, kinesis.stream, collection, "x", start="latest")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(reader.run())
        await until(lambda: refused >= 6, "it tries")
        assert [each.is_iterated for each in reader.source._shard_readers.values()] == [False, False]
        assert await collection.count_documents({"began_at": {"$exists": True}}) == 0
        is_away = False
        await until(lambda: all(each.is_iterated for each in reader.source._shard_readers.values()), "both are begun")
        assert await collection.count_documents({"kind": "shard", "began_at": {"$type": "date"}}) == 2
        task.cancel()
    checkpoints = await reader.source._checkpoints.all()
    began = [each.began_at for each in checkpoints.values()]
    assert all(at is not None and at.microsecond == 0 and at <= utc_now() for at in began)


async def test_a_lost_lease_begins_no_shard(collection: Any) -> None:
    slow, other = (
        CheckpointRepository(collection, "c/s@1", me=me, clock=utc_now, lease_ms=60_000) for me in ("x", "y")
    )
    first = await slow.acquire("a")
    assert first is not None
    await slow.release("a", first[0])
    second = await other.acquire("a")
    assert second is not None
    assert not await slow.record_start("a", first[0], utc_now())
    assert (await other.all())["a"].began_at is None
    at = utc_now().replace(microsecond=0)
    assert await other.record_start("a", second[0], at)
    assert (await slow.all())["a"].began_at == at


async def test_an_instance_that_was_only_slow_moves_no_checkpoint(collection: Any) -> None:
    later = timedelta()
    slow, other = (
        CheckpointRepository(collection, "c/s@1", me=me, clock=lambda: utc_now() + later, lease_ms=60_000)
        for me in ("x", "y")
    )
    taken = await slow.acquire("a")
    assert taken is not None
    assert await other.acquire("a") is None, "it is held"
    later = timedelta(seconds=61)
    assert await other.acquire("a") is not None, "the lease lapsed"
    assert not await slow.advance("a", taken[0], sequence="99")
    assert await slow.renew({"a": taken[0]}) == {"a"}
    assert (await other.all())["a"].sequence == ""
    assert (await other.all())["a"].owner == "y"


async def test_a_stream_that_is_not_there_is_named(moto: Moto, collection: Any) -> None:
    reader = Reader(moto, "none", collection, "x")
    with pytest.raises(Unavailable, match="describing stream none: there is no such stream: create it"):
        await reader.run()


async def test_a_record_that_is_too_large_is_refused_before_it_is_sent(moto: Moto, kinesis: Kinesis) -> None:
    async with KinesisSink(Access(kinesis.stream, REGION, moto.endpoint)) as sink:
        with pytest.raises(InvalidArgument, match="at most 1048576 bytes"):
            await sink.send(Outgoing(b"x" * (1 << 20)))
        key = b"k" * 100
        room = (1 << 20) - len(envelope.pack(Outgoing(b"", key)))
        with pytest.raises(InvalidArgument, match=f"takes {(1 << 20) + 100}"):  # The key counts too.
            await sink.send(Outgoing(b"x" * room, key))
        await sink.send(Outgoing(b"x" * (room - 100), key))
