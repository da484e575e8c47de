"""The audit log: chains, anchors and retention, and verification that names whatever was changed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from contextlib import suppress
from datetime import timedelta

import pytest
from bson.datetime_ms import DatetimeMS
from hypothesis import given
from hypothesis import strategies as st
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import AutoReconnect

from services.store.audit import chain as chain_module
from services.store.audit.anchors import Anchor, decode
from services.store.audit.chains import Extent
from services.store.audit.entries import FIRST_HASH, chained, entry_of, fits
from services.store.audit.reading import AuditFilter, read
from shoal.access.audit import EVENT_FIELDS, Event
from shoal.errors import DataLoss, InvalidArgument, ResourceExhausted, Unavailable
from tests.store.audit.conftest import KEEP, Audit, act, audit_of


async def test_events_are_entries_of_one_chain_in_their_order(audit: Audit) -> None:
    together = await asyncio.gather(*(audit.chain.record([act(n), act(n, code=7)]) for n in range(40)))

    ids = [id_ for ids in together for id_ in ids]
    # The first entry says that the chain begins.
    assert ids == [audit.id(n) for n in range(2, 82)]
    assert await audit.counts() == (81, 0)
    assert await audit.problems() == []


async def test_a_stop_writes_the_end_of_the_chain(audit: Audit) -> None:
    await audit.record(1)
    await audit.chain.__aexit__(None, None, None)

    last = await audit.entries.find_one({}, sort=[("_id", -1)])
    assert (last["kind"], last["reason"]) == ("chain", "end")
    with pytest.raises(Unavailable):
        await audit.chain.record([act(1)])


async def test_a_chain_without_events_writes_nothing(audit: Audit) -> None:
    await audit.chain.__aexit__(None, None, None)
    await audit.rounds.anchor()

    assert await audit.entries.count_documents({}) == 0
    assert await audit.anchors.named() == []


@pytest.mark.parametrize("field", [field for field in EVENT_FIELDS if field not in ("kind", "code", "count")])
async def test_a_changed_field_is_named(audit: Audit, field: str) -> None:
    await audit.record(3)
    await audit.entries.update_one({"_id": audit.id(3)}, {"$set": {field: "somebody else"}})

    assert [problem.where for problem in await audit.problems()] == [audit.id(3)]


async def test_a_changed_time_or_count_and_an_added_field_are_named(audit: Audit) -> None:
    await audit.record(5)
    entry = await audit.entries.find_one({"_id": audit.id(2)})
    await audit.entries.update_one({"_id": audit.id(2)}, {"$set": {"at": entry["at"] - timedelta(milliseconds=1)}})
    await audit.entries.update_one({"_id": audit.id(3)}, {"$set": {"count": 2}})
    await audit.entries.update_one({"_id": audit.id(5)}, {"$set": {"note": "nothing happened"}})

    assert {problem.where for problem in await audit.problems()} >= {audit.id(2), audit.id(3), audit.id(5)}


async def test_removed_entries_are_named_with_their_number(audit: Audit) -> None:
    await audit.record(6)
    await audit.entries.delete_many({"_id": {"$in": [audit.id(3), audit.id(4)]}})

    (problem,) = [one for one in await audit.problems() if "removed" in one.message]
    assert (problem.where, problem.message) == (audit.id(3), "was removed, and 1 after it")


async def test_exchanged_entries_are_named(audit: Audit) -> None:
    await audit.record(4)
    third, fourth = [await audit.entries.find_one({"_id": audit.id(n)}) for n in (3, 4)]
    await audit.entries.replace_one({"_id": audit.id(3)}, {**fourth, "_id": audit.id(3)})
    await audit.entries.replace_one({"_id": audit.id(4)}, {**third, "_id": audit.id(4)})

    assert {problem.where for problem in await audit.problems()} >= {audit.id(3), audit.id(4)}


async def test_the_end_of_the_own_chain_is_missed_at_once(audit: Audit) -> None:
    await audit.record(4)
    await audit.entries.delete_one({"_id": audit.id(5)})

    (problem,) = await audit.problems()
    assert (problem.where, problem.message) == (audit.chain.writer, "was cut off: entry 5 existed")


async def test_the_end_of_another_chain_is_missed_after_an_anchor(audit: Audit) -> None:
    other = audit_of(audit.parts, "store-1")
    async with other.chain:
        await other.record(4)
        await audit.rounds.anchor()
    await other.entries.delete_many({"_id": {"$gte": other.id(4), "$lt": other.id(9)}})

    (problem,) = await audit.problems()
    assert (problem.where, problem.message) == (other.chain.writer, "was cut off: entries 4 to 5 existed")


async def test_a_chain_that_was_rewritten_whole_is_named_by_its_anchors(audit: Audit) -> None:
    other = audit_of(audit.parts, "store-1")
    async with other.chain:
        await other.record(3)
        await audit.rounds.anchor()
    documents = (
        await other.entries.find({"_id": {"$gt": other.chain.writer, "$lt": other.id(99)}}).sort("_id").to_list()
    )
    previous = FIRST_HASH
    for number, document in enumerate(documents, 1):
        forged = chained(other.chain.writer, number, entry_of(document).at_ms, act(99), previous)
        await other.entries.replace_one({"_id": forged.id}, forged.document())
        previous = forged.hash

    assert [problem.where for problem in await audit.problems()] == [other.id(4)]


async def test_a_chain_that_was_removed_whole_is_named(audit: Audit) -> None:
    await audit.record(2)
    await audit.rounds.anchor()
    await audit.entries.delete_many({})
    await audit_of(audit.parts).rounds.anchor()

    fresh = audit_of(audit.parts)
    assert [(one.where, one.message) for one in await fresh.problems()] == [
        (audit.chain.writer, "was cut off: entries 1 to 3 existed")
    ]


async def test_anchors_that_were_removed_changed_or_made_up_are_named(audit: Audit) -> None:
    for _ in range(4):
        await audit.record(1)
        await audit.rounds.anchor()
    second, third, fourth = (await audit.anchors.named())[1:]
    (audit.parts.root / second.key).unlink()
    path = audit.parts.root / third.key
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":9'))
    content = json.loads((audit.parts.root / fourth.key).read_bytes())
    content["previous"] = FIRST_HASH
    forged = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    name = hashlib.sha256(forged).hexdigest()
    (audit.parts.root / f"audit/0000000004-{name}").write_bytes(forged)

    named = {problem.where for problem in await audit.problems()}
    assert named == {"anchor 2", "anchor 3", "anchor 4"}


async def test_all_anchors_removed_from_the_disk_are_named(audit: Audit) -> None:
    await audit.record(1)
    await audit.rounds.anchor()
    shutil.rmtree(audit.parts.root / "audit")

    assert [problem.where for problem in await audit.problems()] == ["anchor 1"]
    with pytest.raises(DataLoss):
        await audit.rounds.anchor()


async def test_a_chain_that_does_not_grow_gets_no_further_anchor(audit: Audit) -> None:
    await audit.record(1)
    for _ in range(3):
        await audit.rounds.anchor()

    assert await audit.counts() == (2, 1)


async def test_two_leaders_at_once_write_one_anchor(audit: Audit) -> None:
    await audit.record(1)
    other = audit_of(audit.parts)
    newest = await audit.anchors.newest()
    extents = await audit.anchors.extents(newest)
    assert await audit.anchors.write(newest, extents)
    audit.parts.clock.advance(seconds=1)
    assert not await other.anchors.write(newest, extents)

    assert await audit.counts() == (2, 1)
    assert await audit.problems() == []


async def test_retention_removes_the_oldest_entries_and_verification_knows(audit: Audit) -> None:
    await audit.record(3)
    await audit.rounds.anchor()
    audit.parts.clock.advance(days=KEEP.days - 1)
    await audit.record(2)
    await audit.rounds.anchor()
    audit.parts.clock.advance(days=2)
    await audit.record(1)
    await audit.rounds.anchor()

    kept = [doc["_id"] async for doc in audit.entries.find({}, {"_id": 1}).sort("_id")]
    assert kept == [audit.id(n) for n in (5, 6, 7)]
    assert await audit.problems() == []
    await audit.entries.delete_one({"_id": audit.id(5)})
    assert audit.id(5) in [problem.where for problem in await audit.problems()]


async def test_a_chain_that_retention_removed_whole_is_no_problem(audit: Audit) -> None:
    other = audit_of(audit.parts, "store-1")
    async with other.chain:
        await other.record(2)
        await audit.rounds.anchor()
    for _ in range(3):
        audit.parts.clock.advance(days=KEEP.days + 1)
        await audit.record(1)
        await audit.rounds.anchor()

    assert await other.entries.count_documents({"_id": {"$gt": other.chain.writer, "$lt": other.id(99)}}) == 0
    assert await audit.problems() == []
    # Anchors have the retention of entries. The newest one that is too old stays.
    assert next(stored.n for stored in await audit.anchors.named()) > 1


async def test_retention_during_a_verification_is_no_problem(audit: Audit) -> None:
    await audit.record(3)
    await audit.rounds.anchor()
    verification = audit.verification.verify()
    await anext(verification)
    audit.parts.clock.advance(days=KEEP.days + 1)
    await audit.record(1)
    await audit.rounds.anchor()

    assert [problem async for checked in verification for problem in checked.problems] == []


class _Broken:
    """The collection, whose next inserts fail: before MongoDB has the documents, or after."""

    def __init__(self, collection: AsyncCollection, *, after: bool) -> None:
        self._collection = collection
        self._after = after

    def __getattr__(self, name: str) -> object:
        return getattr(self._collection, name)

    async def insert_many(self, documents: list, **options: object) -> None:
        if self._after:
            await self._collection.insert_many(documents, **options)
        raise AutoReconnect("the connection is lost")


@pytest.mark.parametrize(("after", "written"), [(False, [0, 1, 3]), (True, [0, 1, 2, 3])])
async def test_a_failed_write_is_refused_and_repeated_before_later_ones(
    audit: Audit, after: bool, written: list[int]
) -> None:
    """Events that waited for the repeat of an earlier one, in vain, are no part of the chain."""
    await audit.record(1)
    whole = audit.parts.collections.audit
    audit.parts.collections._prepared["audit"] = _Broken(whole, after=after)
    for number in (1, 2):
        with pytest.raises(Unavailable):
            await audit.chain.record([act(number)])
    audit.parts.collections._prepared["audit"] = whole

    (id_,) = await audit.chain.record([act(3)])

    assert id_ == audit.id(len(written) + 1)
    targets = [doc["target"] async for doc in whole.find({"kind": "act"}).sort("_id")]
    assert targets == [f"tenant-{number}" for number in written]
    assert await audit.problems() == []


async def test_entries_of_somebody_else_in_the_chain_begin_another_chain(audit: Audit) -> None:
    await audit.record(1)
    first, head = audit.chain.writer, audit.chain.head
    forged = chained(first, 3, head.at_ms, act(99), head.hash)
    await audit.entries.insert_one(forged.document())

    with pytest.raises(Unavailable, match="changed from outside"):
        await audit.chain.record([act(1)])
    (id_,) = await audit.chain.record([act(2)])

    assert id_ == audit.id(2)
    assert audit.chain.writer != first


async def test_events_beyond_the_bound_are_refused_and_the_others_written(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "MAX_WAITING", 10)
    first = asyncio.ensure_future(audit.chain.record([act(n) for n in range(9)]))
    await asyncio.sleep(0)

    with pytest.raises(ResourceExhausted):
        await audit.chain.record([act(1), act(2)])
    assert len(await first) == 9


async def test_a_cancelled_caller_harms_no_other(audit: Audit) -> None:
    first = asyncio.ensure_future(audit.chain.record([act(1)]))
    second = asyncio.ensure_future(audit.chain.record([act(2)]))
    await asyncio.sleep(0)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first

    (id_,) = await second
    assert (await audit.entries.find_one({"_id": id_}))["target"] == "tenant-2"


async def test_invalid_events_are_refused_whole(audit: Audit) -> None:
    for event in (act(1, kind="chain"), act(1, kind=""), act(1, code=17), act(1, count=0)):
        with pytest.raises(InvalidArgument):
            await audit.chain.record([act(0), event])

    assert await audit.entries.count_documents({}) == 0


async def test_reads_filter_by_time_tenant_subject_and_kind(audit: Audit) -> None:
    for number in range(6):
        await audit.chain.record([act(number, tenant="acme" if number % 2 else "globex")])
        audit.parts.clock.advance(seconds=1)

    async def targets(**fields: object) -> list[str]:
        wanted = AuditFilter(kinds=["act"], **fields)
        return [entry.event.target async for page in read(audit.parts.collections, wanted) for entry in page]

    since = audit.parts.clock.now - timedelta(seconds=4)
    assert await targets(tenant="acme") == ["tenant-1", "tenant-3", "tenant-5"]
    assert await targets(since=since, limit=2) == ["tenant-2", "tenant-3"]
    assert await targets(until=since, newest_first=True) == ["tenant-1", "tenant-0"]
    assert await targets(subject="bob") == []
    with pytest.raises(InvalidArgument, match="kinds"):
        _ = [page async for page in read(audit.parts.collections, AuditFilter(kinds=["nothing"]))]


@given(st.lists(st.text(max_size=20), min_size=3, max_size=3), st.text(max_size=600))
def test_any_text_is_storable_and_fits_its_hash(texts: list[str], reason: str) -> None:
    event = Event(kind="act", subject=texts[0], tenant=texts[1], target=texts[2], reason=reason).checked()
    entry = chained("store-0-1", 1, 1_700_000_000_123, event, FIRST_HASH)

    assert len(event.reason) <= 512
    assert fits(entry_of(entry.document()), FIRST_HASH)
    assert not fits(entry_of(entry.document()), "1" * 64)


@pytest.mark.parametrize("id_", ["made up", "other/first", "/1", 7, b"x"])
async def test_a_document_of_no_chain_is_named_and_stops_no_anchor(audit: Audit, id_: object) -> None:
    await audit.record(2)
    at = audit.parts.clock()
    await audit.entries.insert_one(
        {"_id": id_, "at": at, "kind": "act", "hash": FIRST_HASH}, bypass_document_validation=True
    )
    async with asyncio.timeout(30):
        assert [problem.where for problem in await audit.problems()] == [str(id_)]
        await audit.rounds.anchor()
    assert (await audit.anchors.newest()).chains[audit.chain.writer].last == 3


@pytest.mark.parametrize("id_", ["made up", 1.5, -1, 10**12, b"x", True])
async def test_an_anchor_whose_id_is_no_number_of_one_is_named_and_stops_no_anchor(audit: Audit, id_: object) -> None:
    await audit.record(1)
    await audit.rounds.anchor()
    made_up = {"_id": id_, "sha256": "../x", "at": audit.parts.clock()}
    await audit.parts.collections.audit_anchors.insert_one(made_up, bypass_document_validation=True)
    (problem,) = await audit.problems()
    assert problem.where.startswith("anchor ")
    assert problem.message == "is no anchor: its id is no number from 1 on"
    await audit.record(1)
    await audit.rounds.anchor()
    assert (await audit.anchors.newest()).n == 2


async def test_an_anchor_with_the_hash_of_no_blob_is_named(audit: Audit) -> None:
    made_up = {"_id": 7, "sha256": "../x", "at": audit.parts.clock()}
    await audit.parts.collections.audit_anchors.insert_one(made_up, bypass_document_validation=True)
    problems = {problem.where: problem.message for problem in await audit.problems()}
    assert problems.keys() == {"anchor 1", "anchor 7"}
    assert problems["anchor 1"] == "was removed, and 5 after it"


@pytest.mark.parametrize("name", ["n", "at", "previous", "oldest"])
def test_an_anchor_with_a_field_of_another_type_is_none(name: str) -> None:
    good = Anchor(1, 2, FIRST_HASH, 1, {"w": Extent(1, FIRST_HASH, 2, FIRST_HASH)})
    assert decode(good.encode()) == good
    for value in (None, True, [], 1.5):
        with pytest.raises(ValueError, match="are no anchor"):
            decode(json.dumps({**json.loads(good.encode()), name: value}).encode())


async def test_a_document_within_a_chain_that_is_no_entry_stops_no_anchor(audit: Audit) -> None:
    await audit.record(2)
    made_up = f"{audit.id(3)}x"
    await audit.entries.insert_one({"_id": made_up, "at": audit.parts.clock(), "kind": "act", "hash": FIRST_HASH})
    await audit.rounds.anchor()

    assert (await audit.anchors.newest()).chains[audit.chain.writer].last == 3
    assert [problem.where for problem in await audit.problems()] == [made_up]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subject", b"ann"),
        ("reason", {"a": 1}),
        ("code", "7"),
        ("count", 1.5),
        ("at", "now"),
        ("hash", None),
        ("of", []),
    ],
)
async def test_a_field_of_another_type_is_named(audit: Audit, field: str, value: object) -> None:
    await audit.record(3)
    change = {"$set": {field: value}}
    await audit.entries.update_one({"_id": audit.id(3)}, change, bypass_document_validation=True)

    assert audit.id(3) in [problem.where for problem in await audit.problems()]
    with pytest.raises(DataLoss, match="shoal audit verify"):
        _ = [entry async for entry in read(audit.parts.collections, AuditFilter())]


async def test_a_time_that_no_calendar_has_is_named(audit: Audit) -> None:
    await audit.record(3)
    await audit.entries.update_one({"_id": audit.id(3)}, {"$set": {"at": DatetimeMS(9 * 10**15)}})

    assert audit.id(3) in [problem.where for problem in await audit.problems()]
    with pytest.raises(DataLoss, match="shoal audit verify"):
        _ = [entry async for entry in read(audit.parts.collections, AuditFilter())]


@pytest.mark.parametrize("number", ["000000000000", "00000000000", "3", "0000000000002", "٠٠٠٠٠٠٠٠٠٠٠٢"])
async def test_a_copy_of_an_entry_under_a_number_that_no_entry_has_is_named(audit: Audit, number: str) -> None:
    await audit.record(4)
    await audit.rounds.anchor()
    made_up = f"{audit.chain.writer}/{number}"
    entry = await audit.entries.find_one({"_id": audit.id(2)})
    await audit.entries.insert_one({**entry, "_id": made_up, "subject": "victim"})

    assert [problem.where for problem in await audit.problems()] == [made_up]


async def removed_by_retention(audit: Audit) -> list[dict]:
    """Record entries 1 to 4, then 5 and 6 later, when 1 to 4 are too old; return those four."""
    await audit.record(3)
    await audit.rounds.anchor()
    removed = await audit.entries.find({}).sort("_id").to_list()
    audit.parts.clock.advance(days=KEEP.days + 1)
    await audit.record(2)
    await audit.rounds.anchor()
    assert await audit.entries.count_documents({}) == 2
    return removed


async def test_entries_that_were_made_up_before_the_first_that_is_kept_are_named(audit: Audit) -> None:
    removed = await removed_by_retention(audit)
    for document in (removed[0], removed[2]):
        await audit.entries.insert_one({**document, "subject": "victim"})
    assert [problem.where for problem in await audit.problems()] == [audit.id(3), audit.id(1)]
    # The hash that the anchor has of the last entry that was removed.
    await audit.entries.insert_one({**removed[3], "subject": "victim"})
    assert {problem.where for problem in await audit.problems()} >= {audit.id(4)}


async def test_entries_whose_removal_was_interrupted_are_no_problem_and_the_next_round_removes_them(
    audit: Audit,
) -> None:
    removed = await removed_by_retention(audit)
    await audit.entries.insert_many(removed)
    assert await audit.problems() == []
    await audit.entries.delete_one({"_id": audit.id(1)})
    # Nothing proves what entry 2 says, once the entry before it is gone.
    assert [problem.where for problem in await audit.problems()] == [audit.id(2)]

    await audit.rounds.anchor()
    assert await audit.problems() == []
    assert await audit.entries.count_documents({}) == 2


async def test_an_entry_that_is_removed_while_it_is_verified_is_no_problem(audit: Audit) -> None:
    removed = await removed_by_retention(audit)
    await audit.entries.insert_many(removed[2:])
    whole = audit.parts.collections.audit
    audit.parts.collections._prepared["audit"] = _Removing(whole, audit.id(3))

    assert await audit.problems() == []


class _Removing:
    """The collection, from which an entry is removed a moment after it was read."""

    def __init__(self, collection: AsyncCollection, id_: str) -> None:
        self._collection = collection
        self._id = id_

    def __getattr__(self, name: str) -> object:
        return getattr(self._collection, name)

    async def find_one(self, query: dict, *args: object, **options: object) -> object:
        if query == {"_id": self._id}:
            await self._collection.delete_one(query)
        return await self._collection.find_one(query, *args, **options)
