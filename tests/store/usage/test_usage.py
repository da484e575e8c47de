"""What each tenant has: counted as results come and go, found again after a crash; and who has used up a quota."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mesh import mongo
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.retention.rule_repository import RuleRepository
from services.store.retention.rules import DataKind, Rule
from services.store.retention.sweep import Sweep
from services.store.usage import counters as counting
from services.store.usage import totals
from services.store.usage.counters import Counters
from services.store.usage.quotas import Quotas
from services.store.usage.totals import UsageTotals
from services.store.usage.weight import Weight, by_tenant, weight_of
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.store.conftest import Store, on_shared_loop, refused, running_store, stored
from tests.store.retention.test_sweep import Held
from tests.store.test_result_rpc import BAD, FAILED, answer, put, result
from tests.store.test_store_queries import Heard, bare, stages

pytestmark = pytest.mark.mongo

RECORD = 512


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        yield collections


def now() -> datetime:
    return datetime.now(UTC)


async def usage(store: Store, **asked: object) -> dict[str, tuple[int, int]]:
    found = await store.stub.ListUsage(pb.ListUsageRequest(**asked))
    return {one.tenant: (one.results, one.bytes) for one in found.usages}


async def until_usage(store: Store, expected: dict[str, tuple[int, int]]) -> None:
    async def is_so() -> bool:
        return await usage(store) == expected

    await until(is_so, f"usage is {expected}")


async def quota(store: Store, most: int = 0, tenant: str | None = None, *, remove: bool = False) -> None:
    await store.stub.SetQuota(pb.SetQuotaRequest(bytes=None if remove else most, tenant=tenant, remove=remove))


async def test_results_are_counted_as_they_come(store: Store) -> None:
    large, small = answer(2 << 20), answer(100)
    await put(store, result("a", response=large, tenant="t"), result("b", FAILED, tenant="t"))
    await put(store, result("c", response=small), result("d", FAILED, tenant="u"))
    await put(store, result("c", response=large), result("a", FAILED, tenant="t"))  # Too late: nothing comes.
    sizes = {"": (1, RECORD + small.ByteSize()), "t": (2, 2 * RECORD + large.ByteSize()), "u": (1, RECORD)}
    await until_usage(store, sizes)
    assert await usage(store, recount=True) == sizes
    await put(store, result("d", response=small, tenant="u", generation=2))
    sizes["u"] = (1, RECORD + small.ByteSize())
    await until_usage(store, sizes)
    assert await usage(store, recount=True) == sizes


async def test_what_a_stop_has_not_written_yet_is_written(config: StoreConfig) -> None:
    async with running_store(config) as store:
        await put(store, result("a", FAILED))
    async with running_store(config) as store:
        assert await usage(store) == {"": (1, RECORD)}


async def test_retention_gives_room_back(store: Store, config: StoreConfig, collections: Collections) -> None:
    await put(store, *(result(f"t{n}", response=answer(1000 * n), tenant="t") for n in range(1, 5)))
    await put(store, result("big", response=answer(3 << 20), tenant="u"), result("f", FAILED, tenant="u"))
    sizes = await usage(store, recount=True)
    assert len(sizes) == 2
    later = lambda: now() + timedelta(days=2)  # noqa: E731 - a clock
    async with Counters(collections, later) as counters:
        book = RuleRepository(collections, later)
        sweep = Sweep(collections, book, counters, later)
        await book.put(Rule(DataKind.ANSWERS, None, timedelta(days=1)), remove=False)
        assert (await sweep.apply(Held())).answers == 5
        assert await usage(store) == {"t": (4, 4 * RECORD), "u": (2, 2 * RECORD)}
        await book.put(Rule(DataKind.RESULTS, "t", timedelta(days=1)), remove=False)
        assert (await sweep.apply(Held())).results == 4
    assert await usage(store) == {"t": (0, 0), "u": (2, 2 * RECORD)}
    assert await usage(store, recount=True) == {"t": (0, 0), "u": (2, 2 * RECORD)}


async def test_what_a_requeued_job_adds(store: Store, config: StoreConfig, collections: Collections) -> None:
    """Its next result takes the place of a failure that counts; or of one that retention has removed."""
    await put(store, *(result(f"{where}{n}", FAILED, tenant=where) for where in ("old", "new") for n in range(3)))
    await until_usage(store, dict.fromkeys(("old", "new"), (3, 3 * RECORD)))
    later = lambda: now() + timedelta(days=2)  # noqa: E731 - a clock
    async with Counters(collections, later) as counters:
        book = RuleRepository(collections, later)
        await book.put(Rule(DataKind.RESULTS, "old", timedelta(days=1)), remove=False)
        assert (await Sweep(collections, book, counters, later).apply(Held())).results == 3
    await collections.results.delete_one({"_id": "old2"})
    small = answer(100)
    again = [
        result(f"{where}{n}", response=small, tenant=where, generation=2) for where in ("old", "new") for n in range(3)
    ]
    assert all(entry.recorded for entry in await put(store, *again))
    expected = {where: (3, 3 * (RECORD + small.ByteSize())) for where in ("old", "new")}
    await until_usage(store, expected)
    assert await usage(store, recount=True) == expected


async def test_a_recount_finds_what_a_crash_forgot(store: Store, collections: Collections) -> None:
    await put(store, *(result(f"j{n}", FAILED, tenant=f"t{n % 3}") for n in range(30)))
    await until_usage(store, {f"t{n}": (10, 10 * RECORD) for n in range(3)})
    await collections.usage.update_one({"_id": "t0"}, {"$inc": {"results": -4, "bytes": 77}})
    await collections.usage.delete_one({"_id": "t1"})
    assert await usage(store, recount=True) == {f"t{n}": (10, 10 * RECORD) for n in range(3)}
    found = await store.stub.ListUsage(pb.ListUsageRequest())
    assert all(one.HasField("recounted_at") for one in found.usages)


async def test_recounts_in_steps_and_at_once(collections: Collections, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several instances count at once, with steps that end within a moment of many results: none counts twice."""
    monkeypatch.setattr(counting, "_WALK", 7)
    doc = {"outcome": 2, "model_name": "", "model_version": "", "code": 0, "message": "", "attempt": 0, "lease_id": ""}
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    docs = [{**doc, "_id": f"j{n}", "tenant": "t", "instance": "", "recorded_at": moment} for n in range(40)]
    await collections.results.insert_many(docs)
    async with Counters(collections, now) as one, Counters(collections, now) as two:
        await asyncio.gather(*(counters.recount("t") for counters in (one, two, one, two)))
        (found,) = (await Quotas(collections, one, now).list(None, 10))[0]
    assert (found.results, found.bytes) == (40, 40 * RECORD)


async def test_everybody_is_counted_once_a_day_however_many_they_are(collections: Collections) -> None:
    counters = Counters(collections, now)
    for n in range(30):
        counters.recorded([{"_id": "j", "tenant": f"t{n}"}])
    await counters.flush()
    await counters._recount_due()
    assert await collections.usage.count_documents({"recounts": 1}) == 30
    await counters._recount_due()
    assert await collections.usage.count_documents({"recounts": 1}) == 30


async def test_counts_while_results_come_are_kept(collections: Collections) -> None:
    """What comes during a recount is neither forgotten nor counted twice, once all is quiet and counted again."""
    async with Counters(collections, now) as counters:
        counters.recorded([{"_id": "j", "tenant": "t", "response": b"x" * 10}])
        await counters.recount("t")  # That result is nowhere: the recount takes it away again.
        counters.recorded([{"_id": "j", "tenant": "t"}])
        await counters.flush()
        (found,) = (await Quotas(collections, counters, now).list(None, 10))[0]
    assert (found.results, found.bytes) == (1, RECORD)


async def test_what_comes_while_results_are_walked_is_counted_once(collections: Collections) -> None:
    moments = iter(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n) for n in range(100))

    class Busy(Counters):
        """One whose results come while it counts."""

        async def _walked(self, *args: Any) -> Weight:
            doc = {"_id": "late", "tenant": "t", "outcome": 2, "attempt": 0, "recorded_at": next(moments)}
            texts = ("model_name", "model_version", "message", "lease_id", "instance")
            await collections.results.insert_one({**doc, "code": 0, **dict.fromkeys(texts, "")})
            self.recorded([doc])
            await self.flush()
            return await super()._walked(*args)

    async with Busy(collections, lambda: next(moments)) as counters:
        await counters.recount("t")
        (found,) = (await Quotas(collections, counters, now).list(None, 10))[0]
    assert (found.results, found.bytes) == (1, RECORD)


async def test_quotas_and_who_is_over(store: Store) -> None:
    for tenant, count in [("a", 1), ("b", 5), ("c", 9), ("", 2)]:
        await put(store, *(result(f"{tenant}-{n}", FAILED, tenant=tenant) for n in range(count)))
    await usage(store, recount=True)
    assert await usage(store, over_quota=True) == {}
    await quota(store, 5 * RECORD)
    assert set(await usage(store, over_quota=True)) == {"b", "c"}
    await quota(store, 100 * RECORD, "c")
    await quota(store, 0, "a")
    await quota(store, 2 * RECORD, "")
    assert set(await usage(store, over_quota=True)) == {"", "a", "b"}
    found = await store.stub.ListUsage(pb.ListUsageRequest())
    quotas = {one.tenant: one.quota_bytes for one in found.usages}
    assert quotas == {"": 2 * RECORD, "a": 0, "b": 5 * RECORD, "c": 100 * RECORD}
    await quota(store, remove=True)
    assert set(await usage(store, over_quota=True)) == {"", "a"}
    for tenant in ("", "a", "c"):
        await quota(store, tenant=tenant, remove=True)
    found = await store.stub.ListUsage(pb.ListUsageRequest())
    assert not any(one.HasField("quota_bytes") for one in found.usages)
    # The result of a job that was accepted is recorded all the same.
    await quota(store, 0)
    (entry,) = await put(store, result("more", tenant="a"))
    assert entry.recorded


async def test_the_sums_of_usage_and_the_largest_tenants(
    collections: Collections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(totals, "LARGEST", 2)
    async with UsageTotals(collections) as empty:
        await until(lambda: bool(empty.sums), "the counters are read")
    assert (empty.sums, empty.largest) == (dict.fromkeys(empty.sums, 0), {})
    counters = Counters(collections, now)
    weights = {name: Weight(results=n, bytes=100 * n) for n, name in enumerate(("a", "b", "c"), 1)}
    await counters.add(weights | {"b": Weight(2, 5_200, payloads=3, payload_bytes=5_000)})
    async with UsageTotals(collections) as read:
        await until(lambda: bool(read.sums), "the counters are read")
    assert read.sums == {"results": 6, "bytes": 5_600, "payloads": 3, "payload_bytes": 5_000}
    assert [*read.largest.items()] == [("b", 5_200), ("c", 300)]


async def test_pages_of_usage(store: Store) -> None:
    await put(store, *(result(f"j{n}", FAILED, tenant=f"t{n:02}") for n in range(25)), result("d", FAILED))
    await usage(store, recount=True)
    await quota(store, 0)
    for over in (False, True):
        seen: list[str] = []
        token = ""
        while True:
            request = pb.ListUsageRequest(page_size=7, page_token=token, over_quota=over)
            page = await store.stub.ListUsage(request)
            seen += [one.tenant for one in page.usages]
            token = page.next_page_token
            if not token:
                break
            assert len(page.usages) == 7
        assert seen == ["", *(f"t{n:02}" for n in range(25))]


async def test_artifacts_are_added_up(store: Store) -> None:
    await stored(store, b"x" * 1000, b"y" * 24)
    found = await store.stub.ListUsage(pb.ListUsageRequest())
    assert (found.artifacts, found.artifact_bytes) == (2, 1024)


@on_shared_loop
@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.SetQuotaRequest(bytes=-1), "bytes"),
        (pb.SetQuotaRequest(bytes=(1 << 60) + 1), "bytes"),
        (pb.SetQuotaRequest(bytes=1, tenant="t" * 1_025), "tenant"),
        (pb.ListUsageRequest(page_size=-1), "page_size"),
        (pb.ListUsageRequest(page_size=1_001), "page_size"),
        (pb.ListUsageRequest(page_token="x"), "page_token"),
    ],
    ids=str,
)
async def test_hostile_requests_are_named(shared_store: Store, request_: Any, word: str) -> None:
    call = shared_store.stub.SetQuota if isinstance(request_, pb.SetQuotaRequest) else shared_store.stub.ListUsage
    await refused(call(request_), BAD, word)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tenant": "zz"}, {"remove": False}, {"bytes": 5, "remove": True}, {"bytes": 0, "remove": True}],
    ids=str,
)
async def test_a_quota_is_neither_set_nor_removed_unless_the_request_says_which(
    store: Store, fields: dict[str, Any]
) -> None:
    await quota(store, 7 * RECORD, fields.get("tenant"))
    await put(store, result("a", FAILED, tenant="zz"))
    await refused(store.stub.SetQuota(pb.SetQuotaRequest(**fields)), BAD, "bytes, remove: set one of them")
    await until_usage(store, {"zz": (1, RECORD)})
    (found,) = (await store.stub.ListUsage(pb.ListUsageRequest())).usages
    assert found.quota_bytes == 7 * RECORD


async def test_every_question_uses_an_index(collections: Collections, mongo_uri: str, mongo_database: str) -> None:
    heard = Heard()
    async with heard.client(mongo_uri) as client:
        listened = Collections(client[mongo_database])
        await listened.prepare()
        async with Counters(listened, now) as counters:
            quotas = Quotas(listened, counters, now)
            heard.commands.clear()
            counters.recorded([{"_id": "j", "tenant": "t"}])
            await counters.recount("t")
            await counters._recount_due()
            await quotas.put("t", 5)
            await quotas.put(None, 5)
            await quotas.list("a", 5)
            await quotas.list(None, 5, over=True)
            await quotas.recount()
            await quotas.artifacts()
    explained = 0
    for _, command in heard.commands:
        if next(iter(command)) in ("find", "aggregate", "update", "delete"):
            plan = await collections.db.command("explain", bare(command), verbosity="queryPlanner")
            seen = set(stages(plan))
            assert not seen & {"COLLSCAN", "SORT"}, command
            explained += 1
    assert explained >= 10


async def test_mongodb_is_away_for_a_moment(collections: Collections, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is written later, once."""
    counters = Counters(collections, now)
    async with counters:
        counters.recorded([{"_id": "j", "tenant": "t"}])
        ready = collections._prepared
        monkeypatch.setattr(collections, "_prepared", {})
        await counters.flush()
        monkeypatch.setattr(collections, "_prepared", ready)
        counters.recorded([{"_id": "j", "tenant": "t"}])
    (found,) = (await Quotas(collections, counters, now).list(None, 10))[0]
    assert (found.results, found.bytes) == (2, 2 * RECORD)


def test_what_a_result_counts_for() -> None:
    assert weight_of({"response": b"x" * 5}) == Weight(1, RECORD + 5)
    assert weight_of({"blob": {"size": 7}}) == Weight(1, RECORD + 7)
    assert weight_of({"generation": 2, "response": b"x"}, replaces=True) == Weight(0, 1)
    assert by_tenant([("a", Weight(1, 2)), ("b", Weight(1, 1)), ("a", Weight(-1, 3))]) == {
        "a": Weight(0, 5), "b": Weight(1, 1)
    }  # fmt: skip
