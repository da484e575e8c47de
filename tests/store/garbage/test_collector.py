"""What is collected, when, and what never is."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta

import pytest

from services.store.artifacts.stored import new_key
from services.store.garbage import collector as collector_module
from services.store.garbage.collector import Collected
from services.store.garbage.uses import Uses
from shoal.errors import InvalidArgument, NotFound, Unavailable
from tests.store.artifacts.conftest import uploaded
from tests.store.conftest import sha256
from tests.store.garbage.conftest import Parts

pytestmark = pytest.mark.mongo


async def test_the_life_of_an_artifact_that_nobody_needs(parts: Parts) -> None:
    await parts.put(b"abc")
    assert await parts.collector.collect() == Collected()
    parts.clock.advance(hours=23)
    assert await parts.collector.collect() == Collected()  # Its model may still be on its way.
    parts.clock.advance(hours=2)
    assert await parts.collector.collect() == Collected(marked=1)
    assert await parts.read(b"abc") == b"abc"
    parts.clock.advance(minutes=11)
    assert await parts.collector.collect() == Collected(artifacts=1)
    assert await parts.artifacts.find([sha256(b"abc")]) == {}
    assert len(await parts.keys()) == 1  # Whoever reads it now may end.
    parts.clock.advance(minutes=11)
    assert await parts.collector.collect() == Collected(blobs=1)
    assert await parts.keys() == []
    assert await parts.collections.pending_deletions.count_documents({}) == 0
    await parts.put(b"abc")
    assert await parts.read(b"abc") == b"abc"


async def test_what_is_referred_to_stays(parts: Parts) -> None:
    for data in (b"of a model", b"of a job", b"of both", b"of nobody"):
        await parts.put(data)
    await parts.register("m", b"of a model", b"of both")
    await parts.refer("job/1", b"of a job")
    await parts.refer("job/2", b"of both")
    await parts.collect_all()
    assert await parts.known() == {sha256(data) for data in (b"of a model", b"of a job", b"of both")}

    assert await parts.references.release(["job/1", "job/2", "job/3"]) == 2
    await parts.collect_all()
    assert await parts.known() == {sha256(b"of a model"), sha256(b"of both")}

    await parts.registry.remove("m", 0)
    await parts.collect_all()
    assert await parts.known() == set()
    assert await parts.keys() == []


async def test_a_reference_comes_with_an_upload_and_goes_soon(parts: Parts) -> None:
    await parts.put(b"payload", reference="job/1")
    await parts.refer("job/1", b"payload")
    await parts.references.release(["job/1"])
    for _ in range(3):
        parts.clock.advance(minutes=11)
        await parts.collector.collect()
    assert await parts.keys() == []  # Half an hour, not a day.


@pytest.mark.parametrize("who", ["stat", "put", "register", "reference"])
async def test_whoever_asks_for_a_condemned_one_saves_it(parts: Parts, who: str) -> None:
    await parts.put(b"abc")
    parts.clock.advance(days=2)
    assert (await parts.collector.collect()).marked == 1
    if who == "stat":
        assert (await parts.artifacts.stat(sha256(b"abc")))[0]
    elif who == "put":
        assert (await parts.artifacts.put(await uploaded(b"abc")))[1]
    elif who == "register":
        await parts.register("m", b"abc")
    else:
        await parts.refer("me", b"abc")
    parts.clock.advance(minutes=11)
    assert (await parts.collector.collect()).artifacts == 0
    assert await parts.read(b"abc") == b"abc"


async def test_what_is_gone_cannot_be_referred_to(parts: Parts) -> None:
    await parts.put(b"abc")
    await parts.collect_all()
    with pytest.raises(NotFound, match="upload it first"):
        await parts.register("m", b"abc")
    with pytest.raises(Unavailable, match="upload it again"):
        await parts.refer("me", b"abc")
    assert await parts.collections.references.count_documents({}) == 0
    assert await parts.collections.models.count_documents({}) == 0


async def test_gone_between_the_look_and_the_registration(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    await parts.put(b"abc")
    found = await parts.artifacts.find([sha256(b"abc")])

    async def looked_before(*_: object) -> object:
        return found

    await parts.collect_all()
    monkeypatch.setattr(parts.artifacts, "find", looked_before)
    with pytest.raises(NotFound, match="collected"):
        await parts.register("m", b"abc")
    assert await parts.collections.models.count_documents({}) == 0


async def test_strays_of_broken_uploads(parts: Parts) -> None:
    await parts.put(b"abc")
    await parts.register("m", b"abc")
    await parts.blobs.put(new_key(sha256(b"stray")), b"stray")
    await parts.blobs.put("responses/ab/abcdef", b"stray")
    assert (await parts.collector.collect(strays=True)).strays == 0  # Too young: they may be on their way.
    parts.clock.advance(days=2)
    assert (await parts.collector.collect(strays=True)).strays == 2
    parts.clock.advance(minutes=11)
    assert (await parts.collector.collect()).blobs == 2
    assert len(await parts.keys()) == 1
    assert await parts.read(b"abc") == b"abc"


async def test_more_than_one_batch(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector_module, "AT_ONCE", 4)
    contents = [b"%d" % n for n in range(15)]
    await asyncio.gather(*(parts.put(content) for content in contents))
    await parts.register("m", *contents[::3])
    for n in range(9):
        await parts.blobs.put(f"responses/ab/{n}", b"stray")
    await parts.collect_all()
    assert await parts.known() == {sha256(content) for content in contents[::3]}
    assert len(await parts.keys()) == 5


async def test_an_upload_that_takes_longer_than_a_stray_may(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parts.artifacts._written

    async def late(*given: object) -> object:
        parts.clock.advance(days=2)
        await parts.collector.collect(strays=True)
        return await real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(parts.artifacts, "_written", late)
        with pytest.raises(Unavailable, match="upload it again"):
            await parts.put(b"abc")

    async def too_late(*given: object) -> object:
        await parts.collect_all()
        return await real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(parts.artifacts, "_written", too_late)
        with pytest.raises(Unavailable, match="upload it again"):
            await parts.put(b"abc")
    await parts.put(b"abc")
    assert await parts.read(b"abc") == b"abc"


async def test_a_backup_under_way_keeps_every_blob(parts: Parts) -> None:
    await parts.put(b"abc")
    for _ in range(2):
        parts.clock.advance(days=2)
        await parts.collector.collect()
    hold = {"_id": "backup", "expires_at": parts.clock.now + timedelta(hours=1)}
    await parts.collections.holds.insert_one(hold)
    parts.clock.advance(minutes=59)
    assert (await parts.collector.collect()).blobs == 0
    parts.clock.advance(minutes=2)
    assert (await parts.collector.collect()).blobs == 1


async def test_two_rounds_at_once(parts: Parts) -> None:
    contents = [os.urandom(10) for _ in range(30)]
    await asyncio.gather(*(parts.put(content) for content in contents))
    gone = 0
    for _ in range(3):
        parts.clock.advance(days=2)
        done = await asyncio.gather(*(parts.collector.collect() for _ in range(3)))
        gone += sum(each.artifacts for each in done)
    assert gone == 30
    assert await parts.keys() == []


@pytest.mark.parametrize(
    ("name", "words"), [("", "1 to 128"), ("x" * 129, "1 to 128"), ("a\nb", "printable"), ("a\0", "printable")]
)
async def test_a_hostile_name_of_a_reference(parts: Parts, name: str, words: str) -> None:
    await parts.put(b"abc")
    with pytest.raises(InvalidArgument, match=words):
        await parts.refer(name, b"abc")
    with pytest.raises(InvalidArgument, match=r"references\[1\]"):
        await parts.references.release(["right", name])


async def test_references_in_pages(parts: Parts) -> None:
    await parts.put(b"abc")
    names = [f"job/{n:02}" for n in range(7)] + ["other/1", "job-no"]
    for name in names:
        await parts.refer(name, b"abc")
    seen: list[str] = []
    while page := await parts.references.page("job/", seen[-1] if seen else "", "job/05", 2):
        assert len(page) <= 2
        seen += [name for name, digest in page if digest == sha256(b"abc")]
    assert seen == [f"job/{n:02}" for n in range(5)]
    assert len(await parts.references.page("", "", "", 0)) == 9
    for bad in [
        ("x" * 129, "", "", 0),
        ("", "x" * 129, "", 0),
        ("", "", "x" * 129, 0),
        ("", "", "", -1),
        ("", "", "", 1001),
    ]:
        with pytest.raises(InvalidArgument):
            await parts.references.page(*bad)


async def test_every_look_uses_an_index(parts: Parts) -> None:
    await parts.put(b"abc")
    await parts.register("m", b"abc")
    digest = sha256(b"abc")
    found = parts.collections
    queries = [
        (found.artifacts, {"keep_until": {"$not": {"$gte": parts.clock.now}}, "condemned_at": {"$exists": False}}),
        (found.artifacts, {"condemned_at": {"$lte": parts.clock.now}}),
        (found.models, {"files.sha256": {"$in": [digest]}}),
        (found.references, {"digest": {"$in": [digest]}}),
        (found.pending_deletions, {"buried_at": {"$lte": parts.clock.now}}),
        (found.results, {"blob.key": {"$in": ["key"]}}),
        (found.results, {"blob.key": {"$exists": True}}),
    ]
    for collection, query in queries:
        plan = str(await collection.find(query).explain())
        assert "IXSCAN" in plan, query
        assert "COLLSCAN" not in plan, query
    assert await Uses(found).referenced([digest]) == {digest}
