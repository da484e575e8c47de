"""Backups: made, restored into an empty store, and compared, document by document and byte by byte."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bson
import pytest
from bson import Binary, Int64
from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.mongo_lease import LEASES, LeaderLease, fenced
from mesh.process.threads import Threads
from services.store.artifacts.blobs import BlobStore
from services.store.audit.chain import AuditChain
from services.store.backups import backup as backup_module
from services.store.backups import blob_copy, dump, manifest
from services.store.backups import restore as restore_module
from services.store.backups.backup import NOT_CARRIED, Backup
from services.store.backups.locations import BackupLocations
from services.store.backups.progress import BackupProgress
from services.store.backups.restore import Restore, complete_backups
from services.store.results.result_documents import BlobRef
from services.store.usage.counters import Counters
from services.store.usage.weight import Weight, weight_of, weight_of_payloads
from shoal.access.audit import Event
from shoal.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from tests.store.conftest import sha256
from tests.store.garbage.conftest import Clock, Parts, make_parts

pytestmark = pytest.mark.mongo

MIB = 1 << 20


@dataclass
class Node:
    """A store with its backups."""

    parts: Parts
    backup: Backup
    restore: Restore
    locations: BackupLocations

    @property
    def db(self) -> AsyncDatabase[dict[str, Any]]:
        return self.parts.collections.db

    async def fill(self, *contents: bytes) -> None:
        """Something of everything."""
        for content in contents:
            await self.parts.put(content)
        await self.parts.register("m", *contents)
        await self.parts.registry.set_alias("m", "stable", 1)
        await self.parts.refer("job/1", contents[0])
        response = os.urandom(2 * MIB)
        ref = await self.parts.responses.keep(response)
        result = {
            "_id": "j1",
            "outcome": 1,
            "blob": vars(ref),
            "recorded_at": datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC),
            **dict.fromkeys(("model_name", "model_version", "message", "lease_id", "tenant", "instance"), "x"),
            "code": 0,
            "attempt": 1,
        }
        await self.parts.collections.results.insert_one(result)
        # Of ingest: whatever it is. Types that a careless copy would change are among it.
        odd = {"_id": 7, "a": Int64(1), "b": 1, "c": 1.0, "d": Binary(b"x", 5), "e": None, "f": [{"g.h": "$i"}]}
        await self.db["anything"].insert_one(odd)
        await self.db["jobs"].insert_many([{"_id": str(n), "request": os.urandom(100)} for n in range(50)])

    async def documents(self) -> dict[str, list[bytes]]:
        """Every document of every collection that a backup carries, as bytes."""
        found = {}
        for name in await self.db.list_collection_names(filter={"type": "collection"}):
            if name not in NOT_CARRIED and not name.startswith("system."):
                raw = self.db.get_collection(name, codec_options=dump.RAW)
                found[name] = sorted([doc.raw async for doc in raw.find()])
        return {name: docs for name, docs in found.items() if docs}

    async def blobs(self) -> dict[str, bytes]:
        found = {}
        for key in await self.parts.keys():
            found[key] = (self.parts.root / key).read_bytes()
        return found


@asynccontextmanager
async def node_at(
    uri: str, database: str, folder: Path, threads: Threads, allowed: list[str], others: Sequence[str] = ()
) -> AsyncIterator[Node]:
    async with mongo.connect(uri) as client:
        parts = make_parts(client[database], folder, threads, Clock())
        await parts.collections.prepare()
        locations = BackupLocations(allowed, threads, checksums=True)
        given = (parts.collections, parts.blobs, locations, folder / "staging", threads, parts.clock)
        counters = Counters(parts.collections, parts.clock)
        yield Node(parts, Backup(*given, others), Restore(*given, counters, others), locations)


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(4) as threads:
        yield threads


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return (tmp_path / "backups").as_uri()


@pytest.fixture
async def node(mongo_uri: str, mongo_database: str, tmp_path: Path, threads: Threads) -> AsyncIterator[Node]:
    allowed = [tmp_path.as_uri(), "s3://"]
    async with node_at(mongo_uri, mongo_database, tmp_path / "blobs", threads, allowed) as node:
        yield node


@pytest.fixture
async def empty(mongo_uri: str, mongo_database: str, tmp_path: Path, threads: Threads) -> AsyncIterator[Node]:
    """Another node, with nothing in it."""
    allowed = [tmp_path.as_uri(), "s3://"]
    async with node_at(mongo_uri, f"{mongo_database}_2", tmp_path / "other", threads, allowed) as node:
        yield node


async def all_of(steps: AsyncIterator[BackupProgress]) -> BackupProgress:
    last = [step async for step in steps][-1]
    assert last.is_complete
    return last


@pytest.mark.parametrize("where", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
async def test_what_is_restored_is_what_was_there(
    node: Node, empty: Node, folder: str, where: str, request: pytest.FixtureRequest
) -> None:
    to = folder if where == "folder" else request.getfixturevalue("s3_access").prefix()
    contents = [b"", b"small", os.urandom(3 * MIB + 17), os.urandom(9 * MIB)]
    await node.fill(*contents)
    before = await node.documents()
    made = await all_of(node.backup.run(to))
    assert (made.blobs, made.copied, made.missing) == (5, 5, ())
    assert made.documents == sum(map(len, before.values()))
    assert "Timestamp" in made.cluster_time

    done = await all_of(empty.restore.run(to, ""))
    assert (done.backup_id, done.documents, done.blobs) == (made.backup_id, made.documents, 5)
    assert await empty.documents() == before == await node.documents()
    assert await empty.blobs() == await node.blobs()
    for content in contents:
        assert await empty.parts.read(content) == content
    assert [step.finding async for step in empty.parts.verification.run(sizes_only=False) if step.finding] == []
    assert await empty.db["restores"].count_documents({}) == 0
    await empty.parts.put(b"and it goes on")


@pytest.fixture
def another_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system than the store's."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


async def test_a_backup_to_another_disk_and_back(
    mongo_uri: str, mongo_database: str, node: Node, tmp_path: Path, threads: Threads, another_disk: Path
) -> None:
    """Where backups belong. Large blobs go through a file of the store's disk."""
    contents = [b"small", os.urandom(9 * MIB)]
    await node.fill(*contents)
    allowed = [another_disk.as_uri()]
    there = (node.parts.collections, node.parts.blobs, BackupLocations(allowed, threads, checksums=True))
    backup = Backup(*there, tmp_path / "blobs" / "staging", threads, node.parts.clock)
    made = await all_of(backup.run(another_disk.as_uri()))
    assert (made.blobs, made.copied) == (3, 3)
    assert list((another_disk / "staging").iterdir()) == []
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []
    async with node_at(mongo_uri, f"{mongo_database}_2", tmp_path / "other", threads, allowed) as empty:
        await all_of(empty.restore.run(another_disk.as_uri(), ""))
        assert await empty.documents() == await node.documents()
        for content in contents:
            assert await empty.parts.read(content) == content


async def test_the_next_backup_copies_only_what_is_new(node: Node, empty: Node, folder: str) -> None:
    await node.fill(b"one", b"two")
    first = await all_of(node.backup.run(folder))
    await node.parts.put(b"three")
    node.parts.clock.advance(seconds=1)
    second = await all_of(node.backup.run(folder))
    assert (second.blobs, second.copied) == (4, 1)
    assert await complete_backups(await node.locations.open(folder, to_write=False)) == [
        first.backup_id,
        second.backup_id,
    ]
    await all_of(empty.restore.run(folder, first.backup_id))
    assert await empty.parts.known() == {sha256(b"one"), sha256(b"two")}


async def test_what_rotted_in_the_place_is_replaced(node: Node, empty: Node, folder: str, tmp_path: Path) -> None:
    contents = [b"small", b"x" + os.urandom(9 * MIB), b"fine"]
    await node.fill(*contents)
    await all_of(node.backup.run(folder))
    for content in contents[:2]:
        blob = tmp_path / "backups" / manifest.blob_key(sha256(content))
        blob.write_bytes(b"?" + content[1:])  # Of the same size.
    node.parts.clock.advance(seconds=1)
    trusting = await all_of(node.backup.run(folder, trust_sizes=True))
    assert (trusting.copied, trusting.repaired) == (0, 0)
    node.parts.clock.advance(seconds=1)
    made = await all_of(node.backup.run(folder))
    assert (made.blobs, made.copied, made.repaired, made.missing) == (4, 2, 2, ())
    assert made.copied_bytes == len(contents[0]) + len(contents[1])
    await all_of(empty.restore.run(folder, trusting.backup_id))  # It means the same blobs.
    for content in contents:
        assert await empty.parts.read(content) == content


async def test_what_rotted_on_both_sides_is_missing(node: Node, folder: str, tmp_path: Path) -> None:
    await node.fill(b"rotten")
    await all_of(node.backup.run(folder))
    stored = (await node.parts.artifacts.find([sha256(b"rotten")]))[sha256(b"rotten")]
    (node.parts.root / stored.key).write_bytes(b"ROTTEN")
    node.parts.clock.advance(seconds=1)
    assert (await all_of(node.backup.run(folder))).missing == ()  # The place has it.
    (tmp_path / "backups" / manifest.blob_key(sha256(b"rotten"))).write_bytes(b"rotte?")
    node.parts.clock.advance(seconds=1)
    made = await all_of(node.backup.run(folder))
    assert (made.missing, made.repaired) == ((sha256(b"rotten"),), 0)


async def test_the_same_answer_of_many_results_is_read_once_there(
    node: Node, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.fill(b"abc")
    one = await node.parts.collections.results.find_one({})
    assert one is not None
    await node.parts.collections.results.insert_many([{**one, "_id": f"same{n}"} for n in range(40)])
    await all_of(node.backup.run(folder))
    read: list[str] = []
    real = blob_copy._is_intact

    async def is_intact(blob: BlobRef, *rest: Any) -> bool:
        read.append(blob.sha256)
        return await real(blob, *rest)

    monkeypatch.setattr(blob_copy, "_is_intact", is_intact)
    node.parts.clock.advance(seconds=1)
    made = await all_of(node.backup.run(folder))
    assert (made.blobs, made.copied) == (42, 0)
    assert read.count(one["blob"]["sha256"]) <= 8  # Those of one batch do not know of each other.
    assert read.count(sha256(b"abc")) == 1


@pytest.mark.parametrize("what", ["backup", "restore"])
async def test_the_first_error_ends_what_is_copied_beside_it(
    node: Node, empty: Node, folder: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    await node.fill(*(b"%d" % n for n in range(7)))
    if what == "restore":
        await all_of(node.backup.run(folder))
    bad, going_on = sha256(b"3"), 0

    async def copied(blob: BlobRef, *rest: Any, **options: Any) -> blob_copy.CopyOutcome:
        nonlocal going_on
        if blob.sha256 == bad:
            raise Unavailable("the place is away")
        going_on += 1
        try:
            await asyncio.Event().wait()
        finally:
            going_on -= 1
        raise AssertionError("nothing sets it")

    monkeypatch.setattr(backup_module if what == "backup" else restore_module, "copy_blob", copied)
    with pytest.raises(Unavailable, match="the place is away"):
        await all_of(node.backup.run(folder) if what == "backup" else empty.restore.run(folder, ""))
    assert going_on == 0


async def test_every_document_is_of_one_moment(
    node: Node, empty: Node, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "PART_BYTES", 1)  # A part for each document: other things happen in between.
    for name in ("aa", "zz"):
        await node.db[name].insert_many([{"_id": n} for n in range(5)])
    await node.parts.put(b"before")
    before = await node.documents()
    real = backup_module._BackupRun._write_part

    async def written(self: Any, part: Any) -> Any:
        n = await node.db["aa"].count_documents({})
        await node.db["zz"].insert_one({"_id": n})
        await node.db["aa"].insert_one({"_id": n})
        await node.db["zz"].delete_one({"_id": n - 5})
        await node.parts.put(b"%d" % n)
        return await real(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(backup_module._BackupRun, "_write_part", written)
        await all_of(node.backup.run(folder))
    assert await node.documents() != before
    await all_of(empty.restore.run(folder, ""))
    assert await empty.documents() == before
    assert await empty.parts.read(b"before") == b"before"


async def test_what_is_collected_meanwhile_is_in_the_backup(node: Node, empty: Node, folder: str) -> None:
    await node.parts.put(b"abc")
    steps = node.backup.run(folder)
    await anext(steps)  # Its documents are being read.
    for _ in range(3):
        # Nobody refers to it, and it is old enough by any measure, but for the hold.
        long_ago = node.parts.clock.now - timedelta(days=9)
        await node.parts.collections.artifacts.update_many({}, {"$set": {"keep_until": long_ago}})
        await node.parts.collections.artifacts.update_many(
            {"condemned_at": {"$exists": True}}, {"$set": {"condemned_at": long_ago}}
        )
        await node.parts.collections.pending_deletions.update_many({}, {"$set": {"buried_at": long_ago}})
        await node.parts.collector.collect()
    assert await node.parts.known() == set()
    assert len(await node.parts.keys()) == 1
    await all_of(steps)
    assert (await node.parts.collector.collect()).blobs == 1
    await all_of(empty.restore.run(folder, ""))
    assert await empty.parts.read(b"abc") == b"abc"


async def test_a_backup_that_stood_still_for_too_long(node: Node, folder: str) -> None:
    await node.parts.put(b"abc")
    steps = node.backup.run(folder)
    await anext(steps)
    node.parts.clock.advance(minutes=11)
    with pytest.raises(Aborted, match="start it again"):
        [step async for step in steps]
    assert await complete_backups(await node.locations.open(folder, to_write=False)) == []
    assert await node.parts.collections.holds.count_documents({}) == 0


async def test_an_interrupted_backup_is_none_and_the_next_goes_on(node: Node, empty: Node, folder: str) -> None:
    contents = [os.urandom(1000) for _ in range(20)]
    await node.fill(*contents)
    steps = node.backup.run(folder)
    async for step in steps:
        if step.blobs >= 8:
            break
    await steps.aclose()
    with pytest.raises(NotFound, match="no complete backup"):
        await all_of(empty.restore.run(folder, ""))
    with pytest.raises(NotFound, match="interrupted"):
        await all_of(empty.restore.run(folder, step.backup_id))
    assert await empty.documents() == {}
    made = await all_of(node.backup.run(folder))
    assert made.copied == made.blobs - step.blobs
    await all_of(empty.restore.run(folder, ""))
    assert await empty.documents() == await node.documents()
    assert await node.parts.collections.holds.count_documents({}) == 0


async def test_what_a_killed_backup_left_in_its_place_goes(node: Node, folder: str, tmp_path: Path) -> None:
    await node.fill(b"abc")
    await all_of(node.backup.run(folder))
    left, young = (tmp_path / "backups" / "staging" / name for name in ("left.tmp", "young.tmp"))
    for file, age in ((left, timedelta(days=2)), (young, timedelta(hours=2))):  # The young one is of another backup.
        file.write_bytes(b"half a blob")
        os.utime(file, times=((node.parts.clock.now - age).timestamp(),) * 2)
    node.parts.clock.advance(seconds=1)
    await all_of(node.backup.run(folder))
    assert (left.exists(), young.exists()) == (False, True)


async def test_an_interrupted_restore_goes_on(node: Node, empty: Node, folder: str, mongo_uri: str) -> None:
    await node.fill(*[os.urandom(1000) for _ in range(20)])
    first = await all_of(node.backup.run(folder))
    node.parts.clock.advance(seconds=1)
    second = await all_of(node.backup.run(folder))
    steps = empty.restore.run(folder, first.backup_id)
    await anext(steps)
    await anext(steps)
    await steps.aclose()
    with pytest.raises(FailedPrecondition, match=first.backup_id):
        await all_of(empty.restore.run(folder, second.backup_id))
    await all_of(empty.restore.run(folder, first.backup_id))
    assert await empty.documents() == await node.documents()
    assert await empty.blobs() == await node.blobs()


async def test_usage_is_right_after_a_restore(node: Node, empty: Node, folder: str) -> None:
    """What was counted, and what was only noted; also when the restore had to go on, beside somebody who counts."""
    contents = [os.urandom(1000) for _ in range(20)]
    await node.fill(*contents)
    counters = Counters(node.parts.collections, node.parts.clock)
    for n, content in enumerate(contents):
        await node.parts.refer(f"job/{n}", content, f"t{n % 2}")
        if n == 12:
            await counters.flush()
    await node.parts.references.release(["job/0", "job/13"])
    assert await node.parts.collections.usage_changes.count_documents({}) > 0
    await all_of(node.backup.run(folder))
    counters = Counters(empty.parts.collections, empty.parts.clock)
    steps = empty.restore.run(folder, "")
    while await empty.parts.collections.usage_changes.count_documents({}) == 0:
        await anext(steps)
        await counters.flush()
    await steps.aclose()
    async for _ in empty.restore.run(folder, ""):
        await counters.flush()
    await counters.flush()
    expected = {tenant: weight_of_payloads(9, 9_000) for tenant in ("t0", "t1")}
    for _ in range(2):
        docs = [doc async for doc in empty.parts.collections.usage.find()]
        assert {doc["_id"]: Weight.counted(doc).of_payloads for doc in docs if doc["payloads"]} == expected
        for tenant in expected:
            await counters.recount(tenant)


async def test_nothing_is_collected_while_a_restore_is_half_done(node: Node, empty: Node, folder: str) -> None:
    await node.fill(*[os.urandom(1000) for _ in range(20)])
    await all_of(node.backup.run(folder))
    for parts in (node.parts, empty.parts):
        parts.clock.advance(days=30)  # What was uploaded then is long not kept any more without a reference.
    steps = empty.restore.run(folder, "")
    while await empty.parts.collections.artifacts.count_documents({}) < 20:
        await anext(steps)
    assert await empty.parts.collections.references.count_documents({}) == 0
    await empty.parts.collect_all()
    with pytest.raises(FailedPrecondition, match="half restored"):  # Nor is the half a backup.
        await all_of(empty.backup.run(folder))
    async for _ in steps:
        await empty.parts.collect_all()
    assert await empty.documents() == await node.documents()
    assert await empty.blobs() == await node.blobs()
    assert await empty.db["restores"].count_documents({}) == 0
    await all_of(empty.backup.run(folder))


async def test_a_job_whose_key_is_taken_during_the_restore_is_restored_without_it(
    node: Node, empty: Node, folder: str
) -> None:
    await node.fill(b"abc")
    await node.db["jobs"].insert_one({"_id": "restored", "tenant": "t", "key": "k", "request": b"x"})
    await all_of(node.backup.run(folder))
    only_with_key = {"key": {"$exists": True}}
    await empty.db["jobs"].create_index([("tenant", 1), ("key", 1)], unique=True, partialFilterExpression=only_with_key)
    steps = empty.restore.run(folder, "")
    await anext(steps)
    await empty.db["jobs"].insert_one({"_id": "new", "tenant": "t", "key": "k"})
    await all_of(steps)
    assert await empty.db["jobs"].count_documents({}) == 52
    assert await empty.db["jobs"].find_one({"_id": "restored"}) == {"_id": "restored", "tenant": "t", "request": b"x"}


@pytest.mark.parametrize("collection", ["artifacts", "jobs", "anything"])
async def test_a_store_that_is_not_empty_is_left_alone(node: Node, empty: Node, folder: str, collection: str) -> None:
    await node.fill(b"abc")
    await all_of(node.backup.run(folder))
    if collection == "artifacts":
        await empty.parts.put(b"mine")
    else:
        await empty.db[collection].insert_one({"_id": "mine"})
    before = await empty.documents()
    with pytest.raises(FailedPrecondition, match=f"not empty: collection {collection}"):
        await all_of(empty.restore.run(folder, ""))
    assert await empty.documents() == before


async def test_the_audit_log_stays_with_its_node(node: Node, empty: Node, folder: str) -> None:
    """The log of the node that restores has at least the act of restoring."""
    await node.fill(b"a")
    for one, name in ((node, "made"), (empty, "restores")):
        await AuditChain(one.parts.collections, one.parts.clock, name).record([Event(kind="act")])
    made = await all_of(node.backup.run(folder))
    await all_of(empty.restore.run(folder, made.backup_id))

    writers = [doc["_id"].partition("-")[0] async for doc in empty.db["audit"].find({}, {"_id": 1})]
    assert writers == ["restores", "restores"]


async def test_what_is_damaged_in_the_store_is_named_and_not_in_the_backup(
    node: Node, empty: Node, folder: str
) -> None:
    await node.fill(b"fine", b"rotten")
    stored = (await node.parts.artifacts.find([sha256(b"rotten")]))[sha256(b"rotten")]
    (node.parts.root / stored.key).write_bytes(b"ROTTEN")
    made = await all_of(node.backup.run(folder))
    assert made.missing == (sha256(b"rotten"),)
    await all_of(empty.restore.run(folder, ""))
    assert await empty.parts.read(b"fine") == b"fine"
    with pytest.raises(NotFound):
        await empty.parts.read(b"rotten")
    await empty.parts.put(b"rotten")  # The next upload repairs it, as in any store.
    assert await empty.parts.read(b"rotten") == b"rotten"


async def test_what_was_found_damaged_before_the_backup_is_named_too(node: Node, folder: str) -> None:
    """By a reader or by `shoal store verify`: a backup that says nothing of it would pass for one of everything."""
    await node.fill(b"fine", b"rotten")
    stored = (await node.parts.artifacts.find([sha256(b"rotten")]))[sha256(b"rotten")]
    (node.parts.root / stored.key).write_bytes(b"ROTTEN")
    assert [step.finding async for step in node.parts.verification.run(sizes_only=False) if step.finding]
    assert (await all_of(node.backup.run(folder))).missing == (sha256(b"rotten"),)


async def test_of_two_backups_that_are_restored_at_once_one_is(node: Node, empty: Node, folder: str) -> None:
    await node.fill(b"first")
    backups = [await all_of(node.backup.run(folder))]
    await node.parts.put(b"second")
    await node.parts.collections.aliases.delete_many({})
    node.parts.clock.advance(seconds=1)
    backups.append(await all_of(node.backup.run(folder)))
    ends = await asyncio.gather(
        *(all_of(empty.restore.run(folder, made.backup_id)) for made in backups), return_exceptions=True
    )
    done = [end for end in ends if isinstance(end, BackupProgress)]
    assert len(done) <= 1
    assert all(isinstance(end, FailedPrecondition) for end in ends if end not in done), ends
    if not done:  # Each has seen the other: then neither has begun.
        assert await empty.documents() == {}
        await all_of(empty.restore.run(folder, backups[1].backup_id))


async def test_the_same_restore_twice_at_once_brings_nothing_back(node: Node, empty: Node, folder: str) -> None:
    """The first is done, and its node at work, while the second still goes on: what was used up stays used up."""
    await node.fill(b"abc")
    await node.parts.refer("job/2", b"abc", "t")
    await all_of(node.backup.run(folder))
    slow = empty.restore.run(folder, "")
    await anext(slow)
    await all_of(empty.restore.run(folder, ""))
    counters = Counters(empty.parts.collections, empty.parts.clock)
    await counters.flush()  # The note of what job/2 takes.
    await empty.db["anything"].delete_many({})
    with pytest.raises(Aborted, match="another call"):
        await all_of(slow)
    await counters.flush()
    assert await empty.db["anything"].count_documents({}) == 0
    doc = await empty.parts.collections.usage.find_one({"_id": "t"})
    assert doc is not None
    assert Weight.counted(doc).of_payloads == weight_of_payloads(1, 3)


async def test_usage_is_right_when_results_came_during_the_restore(node: Node, empty: Node, folder: str) -> None:
    await node.fill(b"abc")
    counters = Counters(node.parts.collections, node.parts.clock)
    one = await node.parts.collections.results.find_one({})
    assert one is not None
    counters.recorded([one])
    await counters.flush()
    await all_of(node.backup.run(folder))
    counters = Counters(empty.parts.collections, empty.parts.clock)
    steps = empty.restore.run(folder, "")
    await anext(steps)
    new = {**{key: one[key] for key in one if key != "blob"}, "_id": "new"}
    await empty.parts.collections.results.insert_one(new)
    counters.recorded([new])
    await counters.flush()
    await all_of(steps)
    doc = await empty.parts.collections.usage.find_one({"_id": "x"})
    assert doc is not None
    assert Weight.counted(doc) == weight_of(one) + weight_of(new)


@pytest.mark.parametrize("what", ["manifest", "documents", "blob", "blob gone", "no json", "newer"])
async def test_a_damaged_backup_is_refused_and_named(
    node: Node, empty: Node, folder: str, tmp_path: Path, what: str
) -> None:
    await node.fill(b"abc")
    made = await all_of(node.backup.run(folder))
    home = tmp_path / "backups" / "backups" / made.backup_id
    blob = tmp_path / "backups" / manifest.blob_key(sha256(b"abc"))
    file = home / "manifest.json"
    if what == "manifest":
        file.write_text(file.read_text().replace('"documents": 1', '"documents": 2', 1))
    elif what == "no json":
        file.write_bytes(b"\xff" * 100)
    elif what == "newer":
        content = {"format": 2}
        file.write_text(f'{{"sha256": "{manifest._digest(content)}", "manifest": {{"format": 2}}}}')
    elif what == "documents":
        (home / "documents" / "0.bson.gz").write_bytes(b"?")
    elif what == "blob":
        blob.write_bytes(b"ABC")
    else:
        blob.unlink()
    with pytest.raises(
        FailedPrecondition if what == "newer" else DataLoss,
        match="newer" if what == "newer" else "damaged|does not exist",
    ):
        await all_of(empty.restore.run(folder, ""))
    assert sha256(b"abc") not in await empty.parts.known()


async def put_manifest(place: BlobStore, **changed: Any) -> str:
    """A manifest that somebody made up, with a digest that is right."""
    backup_id = "20260101T000000Z-00000000"
    part = {"key": f"backups/{backup_id}/documents/0.bson.gz", "size": 0, "sha256": "0" * 64, **changed.pop("part", {})}
    dumped = {"database": "", "name": "artifacts", "documents": 1, "parts": [part], **changed.pop("dumped", {})}
    content = {"format": 1, "id": backup_id, "cluster_time": "", "finished_at": "", "blobs": 1, "blob_bytes": 1,
               "missing": [], "collections": [dumped], **changed}  # fmt: skip

    data = json.dumps({"sha256": manifest._digest(content), "manifest": content}).encode()
    await place.put(f"backups/{backup_id}/manifest.json", data)
    return backup_id


MADE_UP: list[dict[str, Any]] = [
    {"part": {"key": "../../etc/passwd"}},
    {"part": {"key": "backups/20260101T000000Z-00000001/documents/0.bson.gz"}},
    {"part": {"sha256": "x"}},
    {"dumped": {"name": "system.users"}},
    {"dumped": {"name": "a$b"}},
    {"dumped": {"parts": 7}},
    {"missing": ["x"]},
    {"id": "20260101T000000Z-00000001"},
    {"collections": None},
]


async def test_a_manifest_that_somebody_made_up(empty: Node, tmp_path: Path) -> None:
    for n, changed in enumerate(MADE_UP):
        folder = (tmp_path / f"backups{n}").as_uri()
        place = await empty.locations.open(folder, to_write=True)
        with pytest.raises(DataLoss, match="manifest is damaged"):
            await all_of(empty.restore.run(folder, await put_manifest(place, **changed)))


async def test_a_database_beside_the_store_is_restored_where_it_belongs(
    mongo_uri: str, mongo_database: str, tmp_path: Path, threads: Threads, empty: Node, folder: str
) -> None:
    beside = f"{mongo_database}_3"
    locations = (threads, [tmp_path.as_uri()])
    async with node_at(mongo_uri, mongo_database, tmp_path / "blobs", *locations, [beside]) as node:
        theirs = node.db.client[beside]["jobs"]
        await theirs.insert_one({"_id": 1})
        await all_of(node.backup.run(folder))
        await theirs.drop()
        with pytest.raises(FailedPrecondition, match=f"has database '{beside}', which is not known to belong"):
            await all_of(empty.restore.run(folder, ""))
        assert await empty.documents() == {}
        assert await theirs.find_one({}) is None
        async with node_at(mongo_uri, f"{mongo_database}_2", tmp_path / "other", *locations, [beside]) as known:
            await all_of(known.restore.run(folder, ""))
        assert await theirs.find().to_list() == [{"_id": 1}]
        await node.db.client.drop_database(beside)


async def test_a_restored_schedule_accepts_the_first_leader_of_the_new_node(
    node: Node, empty: Node, folder: str
) -> None:
    schedule = {"_id": "tenant/nightly", "fence": 7, "fired": Int64(3), "template": Binary(b"x"), "next_at": None}
    await node.db["schedules"].insert_one(schedule)
    await all_of(node.backup.run(folder))
    await all_of(empty.restore.run(folder, ""))
    restored = empty.db["schedules"].with_options(codec_options=dump.RAW)
    assert [doc.raw async for doc in restored.find()] == [bson.encode({**schedule, "fence": 0})]
    lease = LeaderLease(empty.db[LEASES], "ingest", "i1", ready=asyncio.Event(), ttl_ms=60_000, renew_ms=1_000)
    await lease.acquire_or_renew()
    assert lease.token == 1
    written = await empty.db["schedules"].update_one({"_id": schedule["_id"], **fenced(1)}, {"$set": {"fence": 1}})
    assert written.matched_count == 1


@pytest.mark.parametrize("key", ["../../../outside", "artifacts/ab/../../../outside", "/etc/passwd", "staging/x", ""])
async def test_a_document_that_would_write_elsewhere(node: Node, empty: Node, folder: str, key: str) -> None:

    place = await node.locations.open(folder, to_write=True)
    doc = {"_id": sha256(b"abc"), "size": 3, "created_at": datetime.now(UTC), "key": key or "artifacts"}
    data = dump.compressed([RawBSONDocument(bson.encode(doc))])
    part = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    backup_id = await put_manifest(place, part=part)
    await place.put(f"backups/{backup_id}/documents/0.bson.gz", data)
    await place.put(manifest.blob_key(sha256(b"abc")), b"abc")
    with pytest.raises(DataLoss, match="which no store makes"):
        await all_of(empty.restore.run(folder, backup_id))
    assert await empty.parts.keys() == []


async def test_places_that_may_not_be_used(node: Node) -> None:
    for url, error in (
        ("", InvalidArgument),
        ("/tmp/x", InvalidArgument),
        ("file:///", InvalidArgument),
        ("http://host/x", InvalidArgument),
        ("file:///etc", PermissionDenied),
        ("gs://bucket", PermissionDenied),
    ):
        with pytest.raises(error):
            await all_of(node.backup.run(url))
        with pytest.raises(error):
            await all_of(node.restore.run(url, ""))


async def test_a_place_that_is_a_file(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for url in ((tmp_path / "file").as_uri(), (tmp_path / "file" / "below").as_uri()):
        with pytest.raises(FailedPrecondition, match=r"file.* cannot be made .*: a file has that name"):
            await all_of(node.backup.run(url))
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
async def test_a_place_where_the_store_may_not_write(
    node: Node, folder: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))  # Whoever runs this test may be allowed everything.

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionDenied, match="let the user that the store runs as write there"):
        await all_of(node.backup.run(folder))


async def test_no_way_out_of_an_allowed_folder(node: Node, folder: str, tmp_path: Path) -> None:
    for url in (f"{folder}/../../x", f"{folder}/%2e%2e/%2e%2e/x"):
        with pytest.raises(PermissionDenied, match="SHOAL_STORE_BACKUPS"):
            await all_of(node.backup.run(url))
    with pytest.raises(FailedPrecondition, match="no folder"):
        await all_of(node.restore.run(f"{folder}/nothing", ""))
    (tmp_path / "backups").mkdir()
    with pytest.raises(InvalidArgument, match="backup_id"):
        await all_of(node.restore.run(folder, "../x"))


async def test_a_backup_beside_writers(node: Node, empty: Node, folder: str) -> None:
    """What is restored fits together: no model without its artifacts, no artifact without its bytes."""
    await node.fill(b"first")
    stop = asyncio.Event()

    async def writing(name: str) -> None:
        n = 0
        while not stop.is_set():
            content = f"{name} {n}".encode()
            await node.parts.put(content)
            await node.parts.register(name, content)
            if n > 3:
                await node.parts.registry.remove(name, n - 3)
            n += 1

    writers = [asyncio.create_task(writing(name)) for name in ("w1", "w2", "w3")]
    try:
        made = await all_of(node.backup.run(folder))
    finally:
        stop.set()
        await asyncio.gather(*writers)
    assert made.missing == ()
    await all_of(empty.restore.run(folder, ""))
    for version in await empty.parts.registry.versions(""):
        digests = {file.sha256 for file in version.files}
        assert (await empty.parts.artifacts.find(digests)).keys() == digests
    assert [step.finding async for step in empty.parts.verification.run(sizes_only=False) if step.finding] == []


def test_the_same_documents_are_the_same_bytes() -> None:
    docs = [RawBSONDocument(bson.encode({"_id": n})) for n in range(10)]
    assert dump.compressed(docs) == dump.compressed(docs)
    assert [doc.raw for doc in dump.documents(dump.compressed(docs), "k")] == [doc.raw for doc in docs]
    with pytest.raises(DataLoss, match="k: "):
        dump.documents(b"not gzip", "k")
    with pytest.raises(DataLoss, match="k: "):
        dump.documents(dump.compressed(docs)[:-9], "k")
