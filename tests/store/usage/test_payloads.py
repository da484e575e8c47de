"""Payloads count for their tenants: exactly, as long as they are referred to, whoever does what at once."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh import mongo
from mesh.process.threads import Threads
from services.store.documents import RESTORES, Collections
from services.store.garbage.references import References
from services.store.usage import changes as noting
from services.store.usage import counters as counting
from services.store.usage.changes import Changes
from services.store.usage.counters import Counters
from services.store.usage.quotas import Quotas
from services.store.usage.weight import Weight, weight_of_payloads
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.store.conftest import Store, on_shared_loop, refused, running_store, sha256, store_config
from tests.store.garbage.conftest import Clock, Parts, make_parts
from tests.store.test_result_rpc import BAD, FAILED, put, result
from tests.store.test_store_queries import Heard, bare, stages

pytestmark = pytest.mark.mongo

RECORD = 512
Taken = dict[str, tuple[int, int]]
LARGE, OTHER = os.urandom(300 << 10), os.urandom(400 << 10)


def now() -> datetime:
    return datetime.now(UTC)


def each(count: int, data: bytes = LARGE) -> tuple[int, int]:
    """What so many references to `data` count for."""
    return count, count * (len(data) + RECORD)


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        yield collections


async def usage(store: Store, **asked: object) -> Taken:
    found = await store.stub.ListUsage(pb.ListUsageRequest(**asked))
    assert all(one.bytes == one.payload_bytes for one in found.usages if not one.results)
    return {one.tenant: (one.payloads, one.payload_bytes) for one in found.usages}


async def until_usage(store: Store, expected: Taken) -> None:
    async def is_so() -> bool:
        return await usage(store) == expected

    await until(is_so, f"usage is {expected}")


async def release(store: Store, *names: str) -> int:
    answer = await store.stub.ReleaseArtifacts(pb.ReleaseArtifactsRequest(references=names))
    return answer.released


async def test_payloads_count_as_long_as_they_are_referred_to(store: Store) -> None:
    await store.put(LARGE, reference="job/1", tenant="t")
    await store.put(LARGE, reference="job/2", tenant="t")  # The same bytes, and kept once more.
    await store.put(OTHER, reference="job/3", tenant="u")
    await store.put(LARGE, reference="job/4", tenant="")
    await store.put(LARGE, reference="job/5")
    await store.put(OTHER)
    expected = {"": each(1), "t": each(2), "u": each(1, OTHER)}
    await until_usage(store, expected)
    assert await usage(store, recount=True) == expected
    assert await release(store, "job/1", "job/3", "job/5", "job/none") == 3
    expected |= {"t": each(1), "u": (0, 0)}
    await until_usage(store, expected)
    assert await release(store, "job/1", "job/3") == 0
    assert await usage(store, recount=True) == expected
    found = await store.stub.ListUsage(pb.ListUsageRequest())
    assert (found.artifacts, found.artifact_bytes) == (2, len(LARGE) + len(OTHER))


async def test_a_name_that_moves_changes_by_the_difference(store: Store) -> None:
    await store.put(LARGE, reference="one", tenant="t")
    for _ in range(3):
        await store.put(LARGE, reference="one", tenant="t")
    await until_usage(store, {"t": each(1)})
    await store.put(OTHER, reference="one", tenant="t")
    await until_usage(store, {"t": each(1, OTHER)})
    await store.put(OTHER, reference="one", tenant="u")
    await until_usage(store, {"t": (0, 0), "u": each(1, OTHER)})
    await store.put(LARGE, reference="one")  # As an older ingest does it: for nobody.
    await until_usage(store, {"t": (0, 0), "u": (0, 0)})
    await store.put(LARGE, reference="one", tenant="t")
    await until_usage(store, {"t": each(1), "u": (0, 0)})
    assert await usage(store, recount=True) == {"t": each(1), "u": (0, 0)}
    assert await release(store, "one") == 1
    await until_usage(store, {"t": (0, 0), "u": (0, 0)})


async def test_results_and_payloads_add_up(store: Store) -> None:
    await store.put(LARGE, reference="job/1", tenant="t")
    await put(store, result("a", FAILED, tenant="t"), result("b", FAILED, tenant="t"))
    for recount in (True, False):
        (one,) = (await store.stub.ListUsage(pb.ListUsageRequest(recount=recount))).usages
        assert (one.results, one.payloads) == (2, 1)
        assert (one.bytes, one.payload_bytes) == (len(LARGE) + 3 * RECORD, len(LARGE) + RECORD)


async def test_a_quota_is_compared_with_both(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # A payload that is counted while a quota is read is missed for that moment.
    monkeypatch.setattr(counting, "FLUSH_S", 1.0)

    async def over(tenant: str = "t") -> pb.TenantUsage | None:
        answer = await store.put(LARGE, reference=f"job/{os.urandom(8).hex()}", tenant=tenant)
        return answer.over_quota if answer.HasField("over_quota") else None

    assert await over() is None
    await store.stub.SetQuota(pb.SetQuotaRequest(tenant="t", bytes=4 * (len(LARGE) + RECORD)))
    await put(store, result("a", FAILED, tenant="t"))

    async def both_are_counted() -> bool:
        found = (await store.stub.ListUsage(pb.ListUsageRequest())).usages
        return [(one.results, one.payloads) for one in found] == [(1, 1)]

    await until(both_are_counted, "both are counted")
    assert await over() is None
    assert await over() is None
    told = await over()  # At once: nothing of it is in the counter yet.
    assert told is not None
    assert (told.tenant, told.payloads, told.results) == ("t", 4, 1)
    assert (told.bytes, told.quota_bytes) == (4 * (len(LARGE) + RECORD) + RECORD, 4 * (len(LARGE) + RECORD))
    assert await over("u") is None
    # None is refused, who has come so far, nor is a result.
    assert await over() is not None
    (entry,) = await put(store, result("b", FAILED, tenant="t"))
    assert entry.recorded
    await until_usage(store, {"t": each(5), "u": each(1)})
    assert (await usage(store, over_quota=True)).keys() == {"t"}
    await store.stub.SetQuota(pb.SetQuotaRequest(bytes=0))
    assert await over("new") is not None
    assert await over("") is not None


@on_shared_loop
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tenant": "t"}, ["header.tenant", "header.reference"]),
        ({"tenant": ""}, ["header.tenant", "header.reference"]),
        ({"tenant": "t" * 1_025, "reference": "job/1"}, ["header.tenant", "1025", "1024"]),
    ],
)
async def test_hostile_tenants_are_named(shared_store: Store, fields: dict[str, str], words: Sequence[str]) -> None:
    await refused(shared_store.put(LARGE, **fields), BAD, *words)
    stat = pb.StatArtifactRequest(sha256=sha256(LARGE))
    await refused(shared_store.stub.StatArtifact(stat), grpc.StatusCode.NOT_FOUND)
    assert await usage(shared_store) == {}


async def test_odd_tenants_are_tenants(store: Store) -> None:
    """As in results: a tenant is any text, and each is another."""
    tenants = ["é" * 1_024, "a\0b", "=t", "*", "$where", "job/1\n", "\U0010ffff", "t.u", "t"]
    names = [f"job/{n}" for n in range(len(tenants))]
    for name, tenant in zip(names, tenants, strict=True):
        await store.put(LARGE, reference=name, tenant=tenant)
    expected = dict.fromkeys(tenants, each(1))
    await until_usage(store, expected)
    assert await usage(store, recount=True) == expected
    await release(store, *names)
    await until_usage(store, dict.fromkeys(tenants, (0, 0)))


async def test_what_an_older_version_left(store: Store, collections: Collections) -> None:
    """Its references have no tenant, its counters no payloads."""
    await store.put(LARGE)
    old = {"digest": sha256(LARGE), "made_at": now()}
    await collections.references.insert_many([{**old, "_id": f"job/{n}"} for n in range(3)])
    counter = {"results": 0, "bytes": 0, "recounts": 3, "recounted_at": now()}
    await collections.usage.insert_one({**counter, "_id": "t"})
    assert await usage(store) == {"t": (0, 0)}
    assert await usage(store, recount=True) == {"t": (0, 0)}
    await store.put(LARGE, reference="job/0", tenant="t")
    await until_usage(store, {"t": each(1)})
    assert await release(store, "job/0", "job/1", "job/2") == 3
    await until_usage(store, {"t": (0, 0)})
    doc = await collections.usage.find_one({"_id": "t"})
    assert doc is not None
    assert (doc["payloads"], doc["bytes"], doc["results"]) == (0, 0, 0)


async def test_a_recount_finds_what_is_wrong(store: Store, collections: Collections) -> None:
    for tenant in ("t", "u", "v"):
        await store.put(LARGE, reference=f"job/{tenant}", tenant=tenant)
    await put(store, result("a", FAILED, tenant="t"))
    await until_usage(store, {"t": each(1), "u": each(1), "v": each(1)})
    await release(store, "job/v")
    await until_usage(store, {"t": each(1), "u": each(1), "v": (0, 0)})
    wrong = {"payloads": -7, "payload_bytes": 77, "bytes": 99, "results": 5}
    await collections.usage.update_one({"_id": "t"}, {"$inc": wrong})
    await collections.usage.delete_one({"_id": "u"})
    await collections.usage.update_one({"_id": "v"}, {"$inc": wrong})  # Who has nothing is counted too.
    assert await usage(store, recount=True) == {"t": each(1), "u": each(1), "v": (0, 0)}
    found = {one.tenant: one for one in (await store.stub.ListUsage(pb.ListUsageRequest())).usages}
    assert (found["t"].results, found["t"].bytes) == (1, each(1)[1] + RECORD)
    assert (found["v"].results, found["v"].bytes) == (0, 0)


async def test_what_a_stop_has_not_counted_yet_is_counted(
    mongo_uri: str, mongo_database: str, run_dir: Any, tmp_path: Any, collections: Collections
) -> None:
    config = store_config(mongo_uri, mongo_database, run_dir / "store-0.sock", tmp_path / "blobs")
    async with running_store(config) as store:
        await store.put(LARGE, reference="job/1", tenant="t")
    assert await collections.usage_changes.count_documents({}) == 0
    # Of one that was killed: whoever is there counts it.
    noted = {"tenant": "u", "payloads": 1, "payload_bytes": 1_000}
    await collections.usage_changes.insert_one(noted)
    async with running_store(config) as store:
        await until_usage(store, {"t": each(1), "u": (1, 1_000)})


async def test_nothing_is_counted_while_a_backup_is_being_restored(collections: Collections) -> None:
    """A restore that is repeated brings back what it brought before: what was counted would be counted again."""
    noted = {"tenant": "t", "payloads": 1, "payload_bytes": 1_000}
    await collections.usage_changes.insert_one(noted)
    counters = Counters(collections, now)
    await collections.db[RESTORES].insert_one({"_id": "one"})
    await counters.flush()
    assert await collections.usage.find_one({"_id": "t"}) is None
    await collections.db[RESTORES].delete_one({"_id": "one"})
    await counters.flush()
    doc = await collections.usage.find_one({"_id": "t"})
    assert doc is not None
    assert (doc["payloads"], doc["bytes"]) == (1, 1_000)


async def test_mongodb_is_away_for_a_moment(collections: Collections, monkeypatch: pytest.MonkeyPatch) -> None:
    await collections.usage_changes.insert_one({"tenant": "t", "payloads": 1, "payload_bytes": 1_000})
    counters = Counters(collections, now)
    quotas = Quotas(collections, counters, now)
    await quotas.put("t", 5)
    ready = collections._prepared
    monkeypatch.setattr(collections, "_prepared", {})
    await counters.flush()
    assert await quotas.over("t") is None  # Not known now: and nothing is refused, or fails, for that.
    monkeypatch.setattr(collections, "_prepared", ready)
    over = await quotas.over("t")
    assert over is not None
    assert over.bytes == 1_000
    await counters.flush()
    assert await quotas.over("t") == over


async def test_counting_that_breaks_off_has_counted_nothing(collections: Collections) -> None:
    await collections.usage_changes.insert_one({"tenant": "t", "payloads": 1, "payload_bytes": 1_000})

    class Breaking(Counters):
        """One whose transaction ends after it has changed the counter."""

        async def add(self, *args: Any, **kwargs: Any) -> None:
            await super().add(*args, **kwargs)
            raise Unavailable("as the test wants it")

    await Breaking(collections, now).flush()
    assert await counted(collections) == {}
    for _ in range(2):
        await Counters(collections, now).flush()
        assert await counted(collections) == {"t": Weight(0, 1_000, 1, 1_000)}


async def test_many_notes_are_counted_in_steps(collections: Collections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noting, "AT_ONCE", 7)
    notes = [{"tenant": f"t{n % 3}", "payloads": 1, "payload_bytes": n} for n in range(60)]
    await collections.usage_changes.insert_many(notes)
    await asyncio.gather(*(Counters(collections, now).flush() for _ in range(4)))  # Of several instances.
    assert await collections.usage_changes.count_documents({}) == 0
    docs = [doc async for doc in collections.usage.find().sort("_id", 1)]
    assert [doc["payloads"] for doc in docs] == [20, 20, 20]
    assert sum(doc["bytes"] for doc in docs) == sum(range(60))


async def summed(collections: Collections) -> dict[str, Weight]:
    """What the tenants have, added up from the references themselves."""
    sums: dict[str, Weight] = {}
    async for doc in collections.references.find({"tenant": {"$exists": True}}):
        sums[doc["tenant"]] = sums.get(doc["tenant"], Weight()) + weight_of_payloads(1, doc["size"])
    return sums


async def counted(collections: Collections) -> dict[str, Weight]:
    docs = [doc async for doc in collections.usage.find()]
    return {doc["_id"]: Weight.counted(doc) for doc in docs if Weight.counted(doc)}


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_does_what_at_once_is_counted_once(parts: Parts, seed: int) -> None:
    """Instances that make, move and release the same names, count and recount, some given up in the middle."""
    dice = random.Random(seed)
    data = [bytes([n]) * (1_000 + n) for n in range(4)]
    for content in data:
        await parts.put(content)
    names = [f"job/{n}" for n in range(6)]
    tenants: list[str | None] = ["a", "b", "", None]
    instances = [References(parts.collections, parts.artifacts, parts.clock) for _ in range(3)]
    counters = [Counters(parts.collections, now) for _ in range(3)]

    async def act(n: int) -> None:
        kind = dice.random()
        if kind < 0.5:
            parts.references = dice.choice(instances)
            with suppress(Unavailable):  # As any caller may be told; it is there or not.
                await parts.refer(dice.choice(names), dice.choice(data), dice.choice(tenants))
        elif kind < 0.8:
            await dice.choice(instances).release(dice.sample(names, dice.randint(1, 4)))
        elif kind < 0.95:
            await dice.choice(counters).flush()
        else:
            await dice.choice(counters).recount(dice.choice(["a", "b", ""]))

    async def given_up(n: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(dice.uniform(0.001, 0.02)):
                await act(n)

    for _ in range(12):
        await asyncio.gather(*((given_up if dice.random() < 0.3 else act)(n) for n in range(16)))
        await counters[0].flush()
        assert await counted(parts.collections) == await summed(parts.collections)
    for tenant in ("a", "b", ""):
        await counters[1].recount(tenant)
    assert await counted(parts.collections) == await summed(parts.collections)
    assert await parts.collections.usage_changes.count_documents({}) == 0


async def test_a_recount_beside_changes_is_exact(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    await parts.put(LARGE)
    await parts.refer("job/0", LARGE, "t")
    await parts.collections.usage.insert_one(
        {
            "_id": "t",
            "results": 0,
            "bytes": 11,
            "payloads": 5,
            "payload_bytes": 11,
            "recounts": 0,
            "recounted_at": now(),
        }
    )
    counters = Counters(parts.collections, now)

    class Busy(Counters):
        """One beside which payloads come, go and are counted between what it reads and what it writes."""

        async def _payloads_off(self, tenant: str) -> Weight:
            off = await super()._payloads_off(tenant)
            await parts.refer("job/1", LARGE, "t")
            await parts.refer("job/2", LARGE, "t")
            await counters.flush()
            await parts.references.release(["job/0"])
            return off

    await Busy(parts.collections, now).recount("t")
    await counters.flush()
    assert await counted(parts.collections) == await summed(parts.collections)
    assert (await summed(parts.collections))["t"].payloads == 2


async def test_every_question_uses_an_index(
    collections: Collections, mongo_uri: str, tmp_path: Path, threads: Threads
) -> None:
    heard = Heard()
    async with heard.client(mongo_uri) as client:
        parts = make_parts(client[collections.db.name], tmp_path, threads, Clock())
        listened = parts.collections
        await listened.prepare()
        await parts.put(LARGE)
        counters = Counters(listened, now)
        quotas = Quotas(listened, counters, now)
        await quotas.put("t", 5)
        heard.commands.clear()
        for name, tenant in (("job/1", "t"), ("job/2", "u"), ("job/1", "u")):
            await parts.refer(name, LARGE, tenant)
        assert await quotas.over("t") is None
        await Changes(listened).pending("u")
        await counters.flush()
        await quotas.recount()
        await parts.references.release(["job/1", "job/2"])
        await counters.recount("u")
    explained = set()
    for _, command in heard.commands:
        kind = next(iter(command))
        if kind in ("find", "aggregate", "update", "delete", "findAndModify"):
            plan = await collections.db.command("explain", bare(command), verbosity="queryPlanner")
            assert not set(stages(plan)) & {"COLLSCAN", "SORT"}, command
            explained.add((kind, command[kind]))
    assert explained >= {
        ("aggregate", "references"),
        ("find", "references"),
        ("findAndModify", "references"),
        ("delete", "references"),
        ("find", "usage_changes"),
        ("delete", "usage_changes"),
        ("find", "quotas"),
        ("update", "usage"),
    }


async def test_payloads_are_added_up_in_the_index(collections: Collections) -> None:
    """However many there are: no document is read."""
    doc = {"digest": sha256(LARGE), "made_at": now()}
    await collections.references.insert_many(
        [{**doc, "_id": f"job/{n}", "tenant": f"t{n % 2}", "size": n} for n in range(100)]
    )
    steps = [{"$match": {"tenant": "t1"}}, {"$group": {"_id": None, "size": {"$sum": "$size"}}}]
    command = {"aggregate": "references", "pipeline": steps, "hint": "by_tenant", "cursor": {}}
    plan = await collections.db.command("explain", command, verbosity="executionStats")
    assert "'totalDocsExamined': 0" in str(plan)
    async with Counters(collections, now) as counters:
        await counters.recount("t1")
    assert (await counted(collections))["t1"] == weight_of_payloads(50, sum(range(1, 100, 2)))


def test_what_a_payload_counts_for() -> None:
    assert weight_of_payloads(2, 10) == Weight(0, 10 + 2 * RECORD, 2, 10 + 2 * RECORD)
    both = Weight(3, 50) + weight_of_payloads(1, 10)
    assert both.of_results == Weight(3, 50)
    assert both.of_payloads == weight_of_payloads(1, 10)
    assert not both - both
    assert Weight.counted({"results": 1, "bytes": 2}) == Weight(1, 2)
