"""Quotas and rates on a real MongoDB, with several instances at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import connect, ensure_collection
from services.ingest.documents import INDEXES, JOBS, VALIDATOR, document_of
from services.ingest.intake.backlog import JobBacklog
from services.ingest.tenants.admission import Admission
from services.ingest.tenants.bucket import HELD_S, Buckets
from services.ingest.tenants.pending import PendingCounts
from services.ingest.tenants.settings import TenantLimits, TenantSettings
from services.ingest.tenants.tenant_repository import TenantRepository
from services.ingest.tenants.tenant_status import COUNTED_MOST, TenantStatuses
from shoal.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from tests.breakable import until
from tests.clocks import Seconds
from tests.ingest.making import START, job

Database = AsyncDatabase[dict[str, Any]]
NEVER_AGAIN = TenantLimits(rate=0.001, burst=20)


@pytest.fixture
async def database(mongo_uri: str, mongo_database: str) -> AsyncIterator[Database]:
    async with connect(mongo_uri) as client:
        await ensure_collection(client[mongo_database], JOBS, validator=VALIDATOR, indexes=INDEXES)
        await Buckets(client[mongo_database], time.monotonic).open()
        yield client[mongo_database]


async def taken(buckets: Buckets, limits: TenantLimits, submits: int) -> int:
    """How many of so many submits at once are let in."""

    async def one() -> bool:
        if buckets.has_tokens("t"):
            buckets.take_held("t")
            return True
        with suppress(ResourceExhausted):
            await buckets.take("t", limits)
            return True
        return False

    return sum(await asyncio.gather(*(one() for _ in range(submits))))


async def test_instances_together_hand_out_no_more_than_the_burst(database: Database) -> None:
    instances = [Buckets(database, time.monotonic) for _ in range(4)]
    counts = await asyncio.gather(*(taken(instance, NEVER_AGAIN, 12) for instance in instances))
    assert sum(counts) == 20
    with pytest.raises(ResourceExhausted, match=r"tenant 't' submits more than its 0\.001 jobs a second") as refused:
        await instances[0].take("t", NEVER_AGAIN)
    assert refused.value.retry_after_ms
    assert 100_000 < refused.value.retry_after_ms <= 1_000_000


async def test_a_rate_is_kept_over_time(database: Database) -> None:
    limits = TenantLimits(rate=200, burst=10)
    instances = [Buckets(database, time.monotonic) for _ in range(3)]
    started = time.monotonic()
    accepted = 0

    async def some() -> bool:
        nonlocal accepted
        accepted += sum(await asyncio.gather(*(taken(instance, limits, 5) for instance in instances)))
        return accepted >= 150

    await until(some, "a rate of 200 lets 150 in", every_s=0.01)
    assert accepted <= limits.burst + limits.rate * (time.monotonic() - started + HELD_S)


async def test_a_refused_tenant_costs_the_database_nothing(database: Database) -> None:
    clock = Seconds()
    buckets = Buckets(database, clock)
    assert await taken(buckets, NEVER_AGAIN, 21) == 20
    await database["tenant_rates"].drop()  # Whoever asked it would find a full one.
    assert await taken(buckets, NEVER_AGAIN, 50) == 0
    clock.now += 1_001
    assert await taken(buckets, NEVER_AGAIN, 1) == 1


async def test_a_higher_rate_counts_at_once(database: Database) -> None:
    buckets = Buckets(database, Seconds())
    assert await taken(buckets, NEVER_AGAIN, 21) == 20
    fast = TenantLimits(rate=1_000_000, burst=20)

    async def let_in() -> bool:
        return await taken(buckets, fast, 1) == 1

    await until(let_in, "the higher rate lets one in", every_s=0.01)  # The database's clock has to go on a little.


async def test_what_is_in_hand_is_not_kept_for_long(database: Database) -> None:
    clock = Seconds()
    buckets = Buckets(database, clock)
    assert await taken(buckets, TenantLimits(rate=50, burst=20), 10) == 10
    await buckets.take("t", TenantLimits(rate=50, burst=20))  # And some more ahead, as it used ten of the last.
    assert buckets.has_tokens("t")
    clock.now += HELD_S + 0.1
    assert not buckets.has_tokens("t")


async def test_a_quota_holds_on_one_instance_and_nearly_so_on_several(database: Database) -> None:
    clock = Seconds()
    jobs = database[JOBS]
    await jobs.insert_many([document_of(job(tenant="t")) for _ in range(6)])
    await jobs.insert_many([document_of(job(tenant=name)) for name in ("", "tt", 't",', "other")])
    one, other = PendingCounts(jobs, clock), PendingCounts(jobs, clock)

    async def admitted(pending: PendingCounts, submits: int) -> int:
        count = 0
        for _ in range(submits):
            with suppress(ResourceExhausted):
                await pending.admit("t", 10)
                count += 1
                await jobs.insert_one(document_of(job(tenant="t")))
        return count

    assert await admitted(one, 3) == 3
    assert await admitted(other, 5) == 1  # It counts nine.
    assert await admitted(one, 3) == 1  # It had counted six, and knows of three more: one too many.
    clock.now += 60
    assert await admitted(one, 5) == await admitted(other, 5) == 0
    with pytest.raises(ResourceExhausted, match="10 jobs of tenant 't' are queued, which is its quota") as refused:
        await one.admit("t", 10)
    assert refused.value.retry_after_ms
    await jobs.delete_many({"tenant": "t"})
    clock.now += 60
    assert not one.has_known_capacity("t", 10)
    assert await admitted(one, 12) == 10


@pytest.fixture
async def repository(database: Database) -> AsyncIterator[TenantRepository]:
    async with TenantRepository(database, read_s=0.02) as made:
        await made.open()
        yield made


async def test_every_instance_hears_of_a_change(database: Database, repository: TenantRepository) -> None:
    async with TenantRepository(database, read_s=0.02) as other:
        await other.open()
        await repository.change("gold", TenantSettings(weight=4, rate=10), ())
        await repository.change("*", TenantSettings(max_pending=5), ())
        assert repository.limits("gold") == TenantLimits(4, 5, 10, 10)
        await until(lambda: other.limits("gold") == TenantLimits(4, 5, 10, 10), "the other instance hears")
        assert other.limits("nobody") == TenantLimits(max_pending=5)
        await other.change("gold", TenantSettings(max_pending=0), ("weight", "rate"))
        await until(lambda: repository.limits("gold") == TenantLimits(), "the first instance hears")
    late = TenantRepository(database)
    await late.open()
    assert late.limits("gold") == TenantLimits()
    assert late.weight("nobody") == 1


async def test_only_what_has_changed_is_read(database: Database, repository: TenantRepository) -> None:
    await repository.change("t", TenantSettings(weight=4), ())
    plan = await database["tenants"].find({"updated_at": {"$gt": START}}).explain()
    assert "'indexName': 'changed'" in str(plan["queryPlanner"]["winningPlan"])


async def test_there_are_not_endlessly_many(repository: TenantRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.ingest.tenants.tenant_repository.MOST", 2)
    await repository.change("a", TenantSettings(weight=1), ())
    await repository.change("b", TenantSettings(weight=1), ())
    with pytest.raises(FailedPrecondition, match="2 tenants have settings already"):
        await repository.change("c", TenantSettings(weight=1), ())
    await repository.change("b", TenantSettings(weight=2), ())


async def test_tenants_are_listed_with_what_waits(database: Database, repository: TenantRepository) -> None:
    jobs = database[JOBS]
    await jobs.insert_many(
        [document_of(job(tenant=f"t{n % 3}", model_name=f"m{n}", priority=n % 5)) for n in range(30)]
    )
    await jobs.insert_one(document_of(job(tenant="")))
    await repository.change("zeta", TenantSettings(weight=2), ())
    standings = TenantStatuses(jobs, repository, PendingCounts(jobs, time.monotonic))
    first, token = await standings.page(2, "")
    rest, end = await standings.page(0, token)
    assert [(one.name, one.pending) for one in (*first, *rest)] == [
        ("", 1),
        ("t0", 10),
        ("t1", 10),
        ("t2", 10),
        ("zeta", 0),
    ]
    assert end == ""
    assert (await standings.page(1, ""))[1] == "="
    assert [one.name for one in (await standings.page(1, "="))[0]] == ["t0"]
    for size, bad in ((0, "\x00"), (0, "ä"), (-1, ""), (201, ""), (2**31 - 1, "")):
        with pytest.raises(InvalidArgument, match="page_"):
            await standings.page(size, bad)


async def test_a_long_queue_is_not_counted_to_its_end(
    database: Database, repository: TenantRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.ingest.tenants.tenant_status.COUNTED_MOST", 20)
    jobs = database[JOBS]
    await jobs.insert_many([document_of(job(tenant="t")) for _ in range(30)])
    standing = await TenantStatuses(jobs, repository, PendingCounts(jobs, time.monotonic)).of("t")
    assert (standing.pending, standing.pending_is_more) == (20, True)
    assert COUNTED_MOST == 10_000


async def test_what_is_at_hand_is_decided_without_a_wait(database: Database, repository: TenantRepository) -> None:
    pending, buckets = PendingCounts(database[JOBS], time.monotonic), Buckets(database, time.monotonic)
    admission = Admission(repository, pending, buckets, node_limits=lambda _: None, share=lambda: None)
    assert admission.try_admit("t")
    await repository.change("t", TenantSettings(max_pending=3, rate=0.001, burst=2), ())
    assert not admission.try_admit("t")
    await admission.admit("t")
    await admission.admit("t")
    for _ in range(3):  # That the rate refuses it does not fill the quota.
        with pytest.raises(ResourceExhausted, match="submits more than"):
            await admission.admit("t")
    await repository.change("t", TenantSettings(rate=0), ())
    await admission.admit("t")
    with pytest.raises(ResourceExhausted, match="3 jobs of tenant 't' are queued"):
        await admission.admit("t")


async def test_a_wait_ends_when_there_is_room_or_patience_does(
    database: Database, repository: TenantRepository
) -> None:
    pending, buckets = PendingCounts(database[JOBS], time.monotonic), Buckets(database, time.monotonic)
    refusals = ["full", "full"]

    def gate(_: str) -> None:
        if refusals:
            raise ResourceExhausted(refusals.pop(), retry_after_ms=1)

    admission = Admission(repository, pending, buckets, node_limits=gate, share=lambda: None)
    await admission.wait("t")
    assert refusals == []
    await repository.change("t", TenantSettings(rate=0.001, burst=1), ())
    await admission.wait("t")
    with pytest.raises(ResourceExhausted, match="submits more than"):
        await admission.wait("t", patience_s=0.05)
    waiting = asyncio.create_task(admission.wait("t"))
    await repository.change("t", TenantSettings(rate=0), ())  # Whoever waits hears of it.
    await asyncio.wait_for(waiting, 30)


async def test_a_tenant_has_a_share_of_the_backlog(database: Database, repository: TenantRepository) -> None:
    jobs, backlog = database[JOBS], JobBacklog(30)
    pending, buckets = PendingCounts(jobs, time.monotonic), Buckets(database, time.monotonic)
    admission = Admission(repository, pending, buckets, node_limits=lambda _: backlog.admit(), share=backlog.share)

    async def submitted(tenant: str) -> None:
        if not admission.try_admit(tenant):
            await admission.admit(tenant)
        await jobs.insert_one(document_of(job(tenant=tenant)))
        backlog.added(1)

    for _ in range(21):
        await submitted("many")
    with pytest.raises(ResourceExhausted, match="18 jobs of tenant 'many' are queued, which is twice as many as all"):
        await submitted("many")
    for _ in range(4):
        await submitted("few")
    await repository.change("few", TenantSettings(max_pending=4), ())
    with pytest.raises(ResourceExhausted, match="4 jobs of tenant 'few' are queued, which is its quota"):
        await submitted("few")
    for number in range(5):
        await submitted(f"other-{number}")
    with pytest.raises(ResourceExhausted, match="30 jobs are queued already and the limit is 30"):
        await submitted("last")
    await backlog.recount(lambda limit: jobs.count_documents({}, limit=limit))
    assert backlog.estimate == 30
