"""What retention removes, and what it never touches: on a real MongoDB, with a clock that a test turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mesh import mongo
from mesh.mongo import Document
from mesh.process.threads import Threads
from services.store.artifacts.local_blobs import LocalBlobs
from services.store.documents import Collections
from services.store.results.large_responses import LargeResponses
from services.store.results.results import Results
from services.store.retention import sweep as sweeping
from services.store.retention.rule_repository import RuleRepository, RuleSnapshot
from services.store.retention.rules import DataKind, Rule
from services.store.retention.sweep import Sweep, Swept
from services.store.usage.counters import Counters
from shoal.errors import FailedPrecondition, NotFound
from shoal.store.v1 import store_pb2 as pb
from tests.store.test_store_queries import bare, stages

pytestmark = pytest.mark.mongo

START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
OK, FAILED = pb.Result.OUTCOME_SUCCEEDED, pb.Result.OUTCOME_FAILED
RESULTS, ANSWERS, TOMBSTONES = DataKind.RESULTS, DataKind.ANSWERS, DataKind.TOMBSTONES


@dataclass
class Held:
    """A leader lease with a token, or a lost one."""

    token: int | None = 1


class Clock:
    """The time, as a test sets it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


class World:
    """A store's results and their retention."""

    def __init__(self, collections: Collections, responses: LargeResponses) -> None:
        self.clock = Clock()
        self.collections = collections
        self.results = Results(collections, responses, self.clock)
        self.an_hour_ago = Results(collections, responses, lambda: START - HOUR)
        self.book = RuleRepository(collections, self.clock)
        self.counters = Counters(collections, self.clock)
        self.sweep = self.another()

    def another(self, **options: Any) -> Sweep:
        """Retention in another instance."""
        return Sweep(self.collections, self.book, self.counters, self.clock, **options)

    async def rule(
        self, kind: DataKind, keep: timedelta | None, tenant: str | None = None, *, remove: bool = False
    ) -> None:
        await self.book.put(Rule(kind, tenant, keep), remove=remove)

    async def put(self, job: str, at: timedelta = timedelta(0), size: int = 10, **fields: Any) -> bool:
        self.clock.now, before = START + at, self.clock.now
        result = pb.Result(**{"job_id": job, "outcome": OK, **fields})
        if result.outcome == OK:
            result.response.raw_output_contents.append(b"x" * size)
        ((recorded, _),) = await self.results.put([result])
        self.clock.now = before
        return recorded

    async def all(self) -> list[pb.Result]:
        docs, _ = await self.results.page(pb.ResultFilter(), None, 1_000, self.results.reads.reading(""))
        return [await self.results.whole(doc) for doc in reversed(docs)]

    async def jobs(self) -> list[str]:
        return [result.job_id for result in await self.all()]

    async def applied(self, token: int = 1) -> Swept:
        """Until there is no more."""
        total = Swept()
        while True:
            swept = await self.sweep.apply(Held(token))
            for kind in DataKind:
                setattr(total, kind, getattr(total, kind) + getattr(swept, kind))
            if not swept.more:
                return total

    async def buried(self) -> list[str]:
        return [doc["_id"] async for doc in self.collections.pending_deletions.find({})]


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(2) as threads:
        yield threads


@pytest.fixture
async def world(mongo_uri: str, mongo_database: str, tmp_path: Path, threads: Threads) -> AsyncIterator[World]:
    (tmp_path / "staging").mkdir()
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        yield World(collections, LargeResponses(LocalBlobs(tmp_path, tmp_path / "staging", threads), threads))


async def test_without_rules_nothing_goes(world: World) -> None:
    await world.put("a")
    world.clock.now += 9_999 * DAY
    assert await world.applied() == Swept()
    assert await world.jobs() == ["a"]


async def test_what_is_older_than_its_rule_goes(world: World) -> None:
    for n in range(10):
        await world.put(f"j{n}", n * HOUR)
    await world.rule(RESULTS, 5 * HOUR)
    world.clock.now = START + 9 * HOUR
    assert await world.applied() == Swept(results=4)
    assert await world.jobs() == [f"j{n}" for n in range(4, 10)]  # One that is exactly as old stays.
    assert await world.applied() == Swept()
    world.clock.now += HOUR
    assert await world.applied() == Swept(results=1)


async def test_tenants_have_rules_of_their_own(world: World) -> None:
    for tenant in ("", "a", "b", "c"):
        for n in range(4):
            await world.put(f"{tenant}{n}", n * DAY, tenant=tenant)
    await world.rule(RESULTS, 2 * DAY)
    await world.rule(RESULTS, None, "a")
    await world.rule(RESULTS, DAY, "b")
    await world.rule(RESULTS, 3 * DAY, "")
    world.clock.now = START + 4 * DAY - MINUTE
    assert await world.applied() == Swept(results=1 + 3 + 2)
    assert sorted(await world.jobs()) == sorted(["1", "2", "3", "a0", "a1", "a2", "a3", "b3", "c2", "c3"])


async def test_a_job_whose_result_is_gone_gets_no_other(world: World) -> None:
    await world.put("j", tenant="t", labels={"a": "b"}, attempt=3, lease_id="l", message="m")
    await world.put("dead", outcome=FAILED, code=13)
    await world.rule(RESULTS, HOUR)
    world.clock.now = START + DAY
    assert await world.applied() == Swept(results=2)
    late = pb.Result(job_id="j", outcome=FAILED, code=2, attempt=4)
    ((recorded, standing),) = await world.results.put([late])
    assert not recorded
    assert (standing.outcome, standing.attempt, standing.removed_at.ToDatetime(UTC)) == (OK, 3, START + DAY)
    assert "retention" in standing.message
    assert await world.jobs() == []
    with pytest.raises(NotFound, match="removed by retention"):
        await world.results.get("j")
    # Who asks what stands is told, so that a job in somebody's hands does not run again.
    query = pb.QueryResultsRequest(job_ids=["j", "dead", "none"], omit_response=True, include_removed=True)
    found, _ = await world.results.query(query)
    assert {one.job_id: (one.outcome, one.code) for one in found} == {"j": (OK, 0), "dead": (FAILED, 13)}
    found, _ = await world.results.query(pb.QueryResultsRequest(job_ids=["j", "dead"]))
    assert found == []


async def test_a_requeued_job_has_its_next_result_all_the_same(world: World) -> None:
    await world.put("j", outcome=FAILED, code=13)
    await world.rule(RESULTS, HOUR)
    world.clock.now = START + DAY
    await world.applied()
    assert await world.put("j", DAY, generation=2)
    (only,) = await world.all()
    assert (only.outcome, only.generation, only.HasField("removed_at")) == (OK, 2, False)
    assert not await world.put("j", DAY, generation=2, lease_id="another")


async def test_answers_go_and_records_stay(world: World) -> None:
    for n in range(3):
        await world.put(f"j{n}", n * DAY, tenant="t")
    await world.put("failed", outcome=FAILED, message="boom")
    await world.put("large", size=2 << 20)
    await world.rule(ANSWERS, DAY)
    world.clock.now = START + 2 * DAY - HOUR
    assert await world.applied() == Swept(answers=2)
    found = {one.job_id: one for one in await world.all()}
    assert {job for job, one in found.items() if one.HasField("response")} == {"j1", "j2"}
    assert {job for job, one in found.items() if one.HasField("answer_removed_at")} == {"j0", "large"}
    assert len(await world.buried()) == 1
    assert (found["j0"].tenant, found["failed"].message) == ("t", "boom")
    assert await world.applied() == Swept()
    world.clock.now += DAY
    assert await world.applied() == Swept(answers=1)


async def test_answers_kept_for_ever_go_once_that_ends(world: World) -> None:
    """However rules came and went: what is old by the rules of today is gone."""
    for tenant in ("a", "b"):
        for n in range(3):
            await world.put(f"{tenant}{n}", n * HOUR, tenant=tenant)
    await world.rule(ANSWERS, HOUR)
    await world.rule(ANSWERS, None, "a")
    world.clock.now = START + DAY
    assert await world.applied() == Swept(answers=3)
    await world.rule(ANSWERS, None, "a", remove=True)
    assert await world.applied() == Swept(answers=3)
    assert not any(one.HasField("response") for one in await world.all())


async def test_large_answers_are_buried_with_their_results(world: World) -> None:
    await world.put("small")
    await world.put("large", size=2 << 20)
    await world.rule(RESULTS, HOUR)
    world.clock.now = START + DAY
    assert await world.applied() == Swept(results=2)
    (key,) = await world.buried()
    assert key.startswith("responses/")


async def test_tombstones_go_when_a_rule_says_so(world: World) -> None:
    await world.put("old")
    await world.put("new", 5 * DAY)
    await world.rule(RESULTS, HOUR)
    await world.rule(TOMBSTONES, 2 * DAY)
    world.clock.now = START + DAY
    assert await world.applied() == Swept(results=1)
    world.clock.now = START + 4 * DAY
    assert await world.applied() == Swept(tombstones=1)
    assert await world.collections.results.count_documents({}) == 1
    assert await world.jobs() == ["new"]


async def test_it_goes_on_in_the_next_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 3)
    for n in range(40):
        await world.put(f"j{n:02}", n * MINUTE, tenant=f"t{n % 4}")
    await world.rule(RESULTS, HOUR)
    await world.rule(RESULTS, 2 * HOUR, "t3")
    await world.rule(ANSWERS, None)
    world.clock.now = START + DAY
    ticks = iter(range(10_000))
    world.sweep = world.another(monotonic=lambda: float(next(ticks)))  # Time is up after two batches.
    calls = 0
    removed = 0
    while True:
        swept = await world.sweep.apply(Held())
        removed += swept.results
        calls += 1
        if not swept.more:
            break
        assert 1 <= swept.results <= 9
    assert (removed, await world.jobs()) == (40, [])
    assert calls > 5


async def test_a_leader_that_was_succeeded_removes_nothing(world: World) -> None:
    await world.put("j")
    await world.rule(RESULTS, HOUR)
    world.clock.now = START + DAY
    await world.applied(token=7)
    await world.put("k", 2 * HOUR)
    with pytest.raises(FailedPrecondition, match="a later leader, 7"):
        await world.sweep.apply(Held(6))
    assert await world.jobs() == ["k"]
    assert (await world.applied(token=8)).results == 1


async def test_a_leader_that_has_lost_its_lease_removes_nothing_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 3)
    for n in range(20):
        await world.put(f"j{n:02}", n * MINUTE)
    await world.rule(RESULTS, HOUR)
    world.clock.now = START + DAY
    assert await world.sweep.apply(Held(None)) == Swept(more=True)
    assert len(await world.jobs()) == 20

    class Losing:
        """A lease that is lost after two batches."""

        def __init__(self) -> None:
            self.tokens = [1, 1, None]

        @property
        def token(self) -> int | None:
            return self.tokens.pop(0)

    assert await world.sweep.apply(Losing()) == Swept(results=6, more=True)
    assert len(await world.jobs()) == 14


async def test_a_fence_that_an_older_version_wrote_stops_no_leader(world: World) -> None:
    """Its token was one of etcd's election, and greater than those of the lease."""
    await world.put("j")
    await world.put("k", HOUR)
    await world.rule(RESULTS, HOUR)
    await world.collections.fences.update_one({"_id": "retention"}, {"$set": {"token": 700, "etcd": "an id"}})
    world.clock.now = START + 2 * HOUR - MINUTE
    assert (await world.applied(token=7)).results == 1
    world.clock.now += HOUR
    with pytest.raises(FailedPrecondition, match="a later leader, 7"):
        await world.sweep.apply(Held(6))
    assert (await world.applied(token=7)).results == 1


async def test_nothing_goes_under_rules_that_were_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep has read the rules, then they change: it removes by the new ones."""
    await world.put("a", tenant="a")
    await world.put("b", tenant="b")
    await world.rule(RESULTS, HOUR)
    world.clock.now = START + DAY
    old = await world.book.read()
    await world.rule(RESULTS, None, "a")
    readings: list[RuleSnapshot] = [old]
    real = world.book.read

    async def read() -> RuleSnapshot:
        return readings.pop() if readings else await real()

    monkeypatch.setattr(world.book, "read", read)
    assert await world.applied() == Swept(results=1)
    assert await world.jobs() == ["a"]


async def test_several_at_once_remove_each_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 7)
    for n in range(120):
        await world.put(f"j{n:03}", n * MINUTE, tenant=f"t{n % 3}")
    await world.rule(RESULTS, HOUR)
    await world.rule(RESULTS, 23 * HOUR, "t0")
    world.clock.now = START + DAY

    async def apply(sweep: Sweep) -> int:
        removed = 0
        while True:
            swept = await sweep.apply(Held(5))
            removed += swept.results
            if not swept.more:
                return removed

    removed = await asyncio.gather(*(apply(world.another()) for _ in range(4)))
    left = [f"j{n:03}" for n in range(120) if n % 3 == 0 and n >= 60]
    assert await world.jobs() == left
    assert sum(removed) == 120 - len(left)


async def test_results_come_and_go_at_once(world: World) -> None:
    """Writers put each job twice while retention removes: each put that came second was told so."""
    await world.rule(RESULTS, MINUTE)
    recorded: list[bool] = []

    async def write(writer: int) -> None:
        for n in range(25):
            for _ in range(2):
                ((first, _),) = await world.an_hour_ago.put([pb.Result(job_id=f"{writer}-{n}", outcome=FAILED)])
                recorded.append(first)

    async def remove() -> int:
        removed = 0
        while len(recorded) < 4 * 50:
            removed += (await world.applied()).results
            await asyncio.sleep(0)
        return removed + (await world.applied()).results

    *_, removed = await asyncio.gather(*map(write, range(4)), remove())
    assert sorted(recorded) == [False] * 100 + [True] * 100
    assert removed == 100
    assert await world.collections.results.count_documents({"removed_at": {"$exists": True}}) == 100


async def test_what_is_kept_is_never_looked_at(world: World, mongo_uri: str, mongo_database: str, heard: Any) -> None:
    """Every question is answered by an index, and reads no document that stays."""
    for n in range(60):
        await world.put(f"j{n:02}", n * HOUR, tenant=f"t{n % 3}")
    for tenant in ("t0", "t1"):
        await world.rule(RESULTS, 50 * HOUR, tenant)
    await world.rule(ANSWERS, 40 * HOUR)
    await world.rule(TOMBSTONES, DAY)
    world.clock.now = START + 60 * HOUR
    async with heard.client(mongo_uri) as client:
        listened = Collections(client[mongo_database])
        await listened.prepare()
        heard.commands.clear()
        sweep = Sweep(listened, RuleRepository(listened, world.clock), Counters(listened, world.clock), world.clock)
        plans: list[Document] = []
        explained = 0
        while (await sweep.apply(Held())).more:
            pass
        for _, command in heard.commands:
            if command.get("find") == "results":
                plan = await world.collections.db.command("explain", bare(command), verbosity="executionStats")
                plans.append(plan)
                explained += 1
    assert explained > 10
    for plan in plans:
        seen = set(stages(plan["queryPlanner"]["winningPlan"]))
        assert not seen & {"COLLSCAN", "SORT"}, plan
        assert plan["executionStats"]["totalDocsExamined"] <= 20 + 1


async def test_a_watch_does_not_take_removals_for_results(world: World) -> None:
    from services.store.results.result_watch import ResultWatch

    watch = ResultWatch(world.collections.db, world.collections, world.results, 2)
    items = watch.follow(pb.WatchResultsRequest())
    await anext(items)
    await world.put("a", size=100_000)
    await world.put("b", size=100_000)
    assert [(await anext(items))[0].job_id for _ in "ab"] == ["a", "b"]
    await world.rule(ANSWERS, MINUTE)
    world.clock.now = START + HOUR
    await world.applied()
    await world.rule(RESULTS, MINUTE)
    await world.applied()
    await world.put("c", HOUR)
    assert (await anext(items))[0].job_id == "c"
    await items.aclose()
