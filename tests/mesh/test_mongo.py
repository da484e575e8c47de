"""mesh.mongo against a real mongod: durable by default, collections made once, errors translated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pymongo
import pytest
from bson.errors import InvalidDocument
from pymongo import ASCENDING, AsyncMongoClient, IndexModel
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    InvalidName,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.lock import _async_cond_wait, _async_create_condition, _async_create_lock

from mesh import mongo
from mesh.mongo import Document, connect, ensure_collection, ensure_indexes, next_change, translate, translated
from shoal.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    ShoalError,
    Unavailable,
)
from tests.breakable import until
from tests.free_ports import free_port
from tests.mongods import MongoProcess

VALIDATOR = {"$jsonSchema": {"bsonType": "object", "required": ["n"], "properties": {"n": {"bsonType": "int"}}}}
INDEX = IndexModel([("n", ASCENDING)], name="by_n", unique=True)


@pytest.fixture
async def db(mongo_uri: str, mongo_database: str) -> AsyncIterator[AsyncDatabase[Document]]:
    async with connect(mongo_uri) as client:
        yield client[mongo_database]


async def test_writes_are_durable_and_reads_are_of_a_majority(mongo_uri: str) -> None:
    for uri in [mongo_uri, f"{mongo_uri}&w=0&journal=false&readConcernLevel=local"]:
        async with connect(uri) as client:
            assert client.write_concern.document == {"w": "majority", "j": True}
            assert client.read_concern.document == {"level": "majority"}
            assert client.options.retry_writes
            assert client.codec_options.tz_aware


async def test_what_the_uri_says_of_waits_and_pools_counts(mongo_uri: str) -> None:
    async with connect(mongo_uri) as client:
        assert client.options.timeout == mongo.TIMEOUT_MS / 1000
        assert client.options.pool_options.max_pool_size == 50
    async with connect(f"{mongo_uri}&TIMEOUTMS=1234&maxPoolSize=7") as client:
        assert client.options.timeout == 1.234
        assert client.options.pool_options.max_pool_size == 7
    async with connect(mongo_uri, max_connections=99) as client:
        assert client.options.pool_options.max_pool_size == 99


@pytest.mark.parametrize("uri", ["", "http://x", "mongodb://", "mongodb://h:port", "mongodb://h:99999"])
async def test_a_wrong_uri(uri: str) -> None:
    with pytest.raises(InvalidArgument, match="mongodb://host"):
        connect(uri)


async def test_a_collection_is_made_with_its_validator_and_indexes(db: AsyncDatabase[Document]) -> None:
    collection = await ensure_collection(db, "c", validator=VALIDATOR, indexes=[INDEX])
    await collection.insert_one({"n": 1})
    with pytest.raises(AlreadyExists, match="inserting"), translated("inserting"):
        await collection.insert_one({"n": 1})
    with pytest.raises(InvalidArgument, match="schema"), translated("inserting"):
        await collection.insert_one({"n": "one"})


async def test_again_and_at_once(db: AsyncDatabase[Document]) -> None:
    for _ in range(3):
        made = [ensure_collection(db, "c", validator=VALIDATOR, indexes=[INDEX]) for _ in range(8)]
        await asyncio.gather(*made)
    assert set(await db["c"].index_information()) == {"_id_", "by_n"}


async def test_a_new_validator_replaces_the_old(db: AsyncDatabase[Document]) -> None:
    await ensure_collection(db, "c", validator=VALIDATOR, indexes=[])
    other = {"$jsonSchema": {"bsonType": "object", "required": ["m"]}}
    await asyncio.gather(*(ensure_collection(db, "c", validator=other, indexes=[INDEX]) for _ in range(8)))
    await db["c"].insert_one({"m": 1})
    with pytest.raises(InvalidArgument), translated("inserting"):
        await db["c"].insert_one({"n": 1})


async def test_a_collection_that_was_made_without_a_validator(db: AsyncDatabase[Document]) -> None:
    await db["c"].insert_one({"n": "old"})
    await ensure_collection(db, "c", validator=VALIDATOR, indexes=[])
    with pytest.raises(InvalidArgument), translated("inserting"):
        await db["c"].insert_one({"n": "new"})


async def test_an_index_that_has_changed(db: AsyncDatabase[Document]) -> None:
    await ensure_collection(db, "c", validator=VALIDATOR, indexes=[INDEX])
    other = IndexModel([("n", ASCENDING), ("m", ASCENDING)], name="by_n")
    with pytest.raises(FailedPrecondition, match="drop the old index"):
        await ensure_collection(db, "c", validator=VALIDATOR, indexes=[other])


async def test_a_mongodb_that_is_away() -> None:
    uri = f"mongodb://127.0.0.1:{free_port()}/?timeoutMS=300&directConnection=true"
    async with connect(uri) as client:
        with pytest.raises(Unavailable, match=r"preparing collection x\.c: MongoDB does not respond"):
            await ensure_collection(client["x"], "c", validator=VALIDATOR, indexes=[])


async def test_a_direct_connection_from_before_the_election_does_not_stay(tmp_path: Path) -> None:
    with MongoProcess(tmp_path) as mongod:
        async with connect(f"mongodb://{mongod.address}/?directConnection=true") as client:

            async def is_refused() -> bool:
                with pytest.raises(AutoReconnect) as refusal:
                    await client.x.c.insert_one({"n": 1})
                return isinstance(refusal.value, NotPrimaryError)

            async def is_transacted() -> bool:
                async with client.start_session() as session:
                    try:
                        with translated("inserting"):
                            await session.with_transaction(
                                lambda session: client.x.c.insert_one({"n": 1}, session=session)
                            )
                    except Unavailable:
                        return False
                return True

            await until(is_refused, "a mongod that is in no set yet refuses")
            await mongod.until_ready()
            await until(is_transacted, "transactions work")


async def test_what_no_document_can_hold(db: AsyncDatabase[Document]) -> None:
    for wrong in [{"n": 1 << 64}, {"n": object()}, {"a\0b": 1}, {"n": "\ud800"}]:
        with pytest.raises(InvalidArgument, match="inserting"), translated("inserting"):
            await db["c"].insert_one(wrong)
    with pytest.raises(InvalidArgument, match="inserting"), translated("inserting"):
        await db["c"].insert_one({"n": bytes(17 << 20)})


def failure(code: int) -> OperationFailure:
    return OperationFailure("it failed", code, {"code": code})


def bulk(*codes: int) -> BulkWriteError:
    return BulkWriteError({"writeErrors": [{"index": at, "code": code} for at, code in enumerate(codes)]})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ServerSelectionTimeoutError("no primary"), Unavailable),
        (NetworkTimeout("slow"), Unavailable),
        (failure(50), Unavailable),
        (failure(91), Unavailable),
        (failure(112), Unavailable),
        (failure(10107), Unavailable),
        (WriteConcernError("not enough members", 100), Unavailable),
        (OperationFailure("x", 9999, {"errorLabels": ["TransientTransactionError"]}), Unavailable),
        (bulk(11000, 91), Unavailable),
        (failure(14031), ResourceExhausted),
        (bulk(14031), ResourceExhausted),
        (failure(13), PermissionDenied),
        (failure(18), PermissionDenied),
        (failure(11000), AlreadyExists),
        (bulk(11000), AlreadyExists),
        (failure(121), InvalidArgument),
        (failure(2), Internal),
        (InvalidName("c."), Internal),
        (PyMongoError(""), Internal),
    ],
)
def test_what_each_error_means(error: PyMongoError, expected: type[ShoalError]) -> None:
    told = translate(error, "doing this")
    assert type(told) is expected
    assert told.message.startswith("doing this: ")


def test_causes_are_kept_and_others_pass() -> None:
    cause = failure(91)
    with pytest.raises(Unavailable) as caught, translated("doing this"):
        raise cause
    assert caught.value.__cause__ is cause
    with pytest.raises(InvalidArgument), translated("doing this"):
        raise InvalidDocument("no")
    with pytest.raises(KeyError), translated("doing this"):
        raise KeyError("not MongoDB's")


async def test_a_cancellation_that_pymongo_swallows_still_counts() -> None:
    async def tries_for_ever() -> None:
        while True:
            try:
                with translated("doing this"):
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError as err:  # As pymongo does.
                        raise AutoReconnect("connection closed") from err
            except Unavailable:
                continue

    class Mended:
        async def try_next(self) -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    for work in (tries_for_ever(), next_change(Mended())):
        task = asyncio.create_task(work)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_nothing_of_the_topology_is_told(mongo_uri: str) -> None:
    async with AsyncMongoClient("mongodb://127.0.0.1:1", serverSelectionTimeoutMS=100) as client:
        with pytest.raises(Unavailable) as caught, translated("reading"):
            await client.x.c.find_one({})
    assert "TopologyDescription" not in caught.value.message
    assert len(caught.value.message) < 300


async def test_who_is_cancelled_while_it_takes_a_lock_again_leaves_it_to_nobody() -> None:
    lock = _async_create_lock()
    condition = _async_create_condition(lock)

    async def waits() -> None:
        async with condition:
            await _async_cond_wait(condition, 60)

    waiting = asyncio.create_task(waits())
    await turns()
    await lock.acquire()
    for _ in range(2):  # A deadline, and then a stop.
        waiting.cancel()
        await turns()
    assert not waiting.done(), "it took the lock that somebody else has"
    lock.release()
    await asyncio.wait([waiting], timeout=30)
    assert waiting.cancelled()
    assert not lock.locked()


async def turns() -> None:
    """Lets everybody else go on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_an_index_of_a_full_collection_is_built_beyond_the_timeout_of_one_operation(
    db: AsyncDatabase[Document], mongo_uri: str
) -> None:
    await ensure_collection(db, "c", validator=VALIDATOR, indexes=[])
    await db["c"].insert_many([{"n": n} for n in range(1_000)])
    async with connect(f"{mongo_uri}&timeoutMS=3000") as client:
        with pymongo.timeout(20):
            await client.admin.command("ping")
        async with db.client.start_session() as session, await session.start_transaction():
            # The build waits for this transaction, as a build of a large collection takes its time.
            await db["c"].insert_one({"n": -1}, session=session)
            building = asyncio.create_task(
                ensure_collection(client[db.name], "c", validator=VALIDATOR, indexes=[INDEX])
            )

            async def takes_longer() -> bool:
                longer = {"microsecs_running": {"$gt": 3_200_000}}
                command = {"currentOp": 1, "command.createIndexes": "c", "command.$db": db.name, **longer}
                return bool((await db.client.admin.command(command))["inprog"]) or building.done()

            await until(takes_longer, "the build takes longer than an operation may")
            assert not building.done()
        await building
    assert "by_n" in await db["c"].index_information()


async def test_retired_indexes_go_when_the_others_are_there(db: AsyncDatabase[Document]) -> None:
    await db["c"].create_indexes([IndexModel("a", name="old"), IndexModel("b", name="older")])
    await ensure_indexes(db["c"], [INDEX], retired=["old", "never"])
    assert set(await db["c"].index_information()) == {"_id_", "by_n", "older"}
    other = IndexModel("x", name="by_n")
    with pytest.raises(FailedPrecondition, match="drop the old index"):
        await ensure_indexes(db["c"], [other], retired=["older"])
    assert "older" in await db["c"].index_information()
