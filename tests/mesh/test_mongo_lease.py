"""Leader lease in MongoDB: one holder at a time, with a greater token in each term."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import connect, ensure_collection
from mesh.mongo_lease import EXPIRED, LEASE_VALIDATOR, LEASES, LeaderLease, fenced
from tests.breakable import until
from tests.clocks import Seconds

pytestmark = pytest.mark.mongo

Collection = AsyncCollection[dict[str, Any]]
TTL_MS = 60_000


@pytest.fixture
async def leases(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collection]:
    async with connect(mongo_uri) as client:
        yield await ensure_collection(client[mongo_database], LEASES, validator=LEASE_VALIDATOR, indexes=[])


def lease_of(leases: Collection, holder: str, clock: Seconds, name: str = "service") -> LeaderLease:
    return LeaderLease(leases, name, holder, ready=asyncio.Event(), ttl_ms=TTL_MS, renew_ms=1_000, clock=clock)


async def expire(leases: Collection) -> None:
    await leases.update_one({}, {"$set": {"expires_at": EXPIRED}})


async def test_one_instance_holds_the_lease_and_keeps_it(leases: Collection) -> None:
    clock = Seconds()
    one, other = lease_of(leases, "$one", clock), lease_of(leases, "other", clock)
    assert (one.token, one.is_held) == (None, False)
    for _ in range(3):
        await one.acquire_or_renew()
        await other.acquire_or_renew()
        assert (one.token, other.token) == (1, None)
        assert (one.is_held, other.is_held) == (True, False)


async def test_a_renewal_is_one_write(leases: Collection, mongo_uri: str, mongo_database: str) -> None:
    one = lease_of(leases, "one", Seconds())
    await one.acquire_or_renew()
    async with connect(mongo_uri) as client:
        database = client[mongo_database]
        await database.command("profile", 2)
        for _ in range(3):
            await one.acquire_or_renew()
        await database.command("profile", 0)
        assert await database["system.profile"].count_documents({"ns": f"{mongo_database}.{LEASES}"}) == 3
    # The document may go meanwhile, as after a restore.
    await leases.delete_many({})
    await one.acquire_or_renew()
    assert one.is_held


async def test_a_holder_stops_by_its_own_clock(leases: Collection) -> None:
    clock = Seconds()
    one = lease_of(leases, "one", clock)
    await one.acquire_or_renew()
    clock.now += TTL_MS / 1_000 - 0.01
    assert one.token == 1
    clock.now += 0.01
    assert (one.token, one.is_held) == (None, False)


async def test_every_term_has_a_greater_token(leases: Collection) -> None:
    clock = Seconds()
    one, other = lease_of(leases, "one", clock), lease_of(leases, "other", clock)
    await one.acquire_or_renew()
    await expire(leases)
    await other.acquire_or_renew()
    assert other.token == 2
    await one.acquire_or_renew()
    assert one.token is None
    await expire(leases)
    await one.acquire_or_renew()
    assert one.token == 3
    await expire(leases)
    await one.acquire_or_renew()
    # Its own expired lease, too, begins a new term: another holder may have written in between.
    assert one.token == 4


async def test_of_many_instances_one_holds_the_lease(leases: Collection) -> None:
    clock = Seconds()
    candidates = [lease_of(leases, f"{n}", clock) for n in range(20)]
    for _ in range(3):
        await asyncio.gather(*(one.acquire_or_renew() for one in candidates))
        assert [one.is_held for one in candidates].count(True) == 1


async def test_services_have_leases_of_their_own(leases: Collection) -> None:
    clock = Seconds()
    ingest, store = lease_of(leases, "one", clock, "ingest"), lease_of(leases, "two", clock, "store")
    await ingest.acquire_or_renew()
    await store.acquire_or_renew()
    assert (ingest.token, store.token) == (1, 1)
    await ingest.release()
    assert (ingest.token, store.token) == (None, 1)


async def test_leaving_the_block_releases_the_lease(leases: Collection) -> None:
    clock = Seconds()
    ready = asyncio.Event()
    async with LeaderLease(leases, "service", "one", ready=ready, ttl_ms=TTL_MS, renew_ms=1_000, clock=clock) as one:
        await one.acquire_or_renew()
    assert one.token is None
    other = lease_of(leases, "other", clock)
    await other.acquire_or_renew()
    assert other.token == 2


async def test_an_instance_that_never_held_the_lease_releases_nothing(leases: Collection) -> None:
    clock = Seconds()
    one, other = lease_of(leases, "one", clock), lease_of(leases, "other", clock)
    await one.acquire_or_renew()
    await other.acquire_or_renew()
    await other.release()
    await other.acquire_or_renew()
    assert (one.token, other.token) == (1, None)


async def test_the_lease_is_renewed_in_the_background_and_passes_on_when_the_holder_is_gone(leases: Collection) -> None:
    ready = asyncio.Event()
    holder = LeaderLease(leases, "service", "one", ready=ready, ttl_ms=1_000, renew_ms=100)
    async with LeaderLease(leases, "service", "other", ready=ready, ttl_ms=TTL_MS, renew_ms=100) as other:
        # Acquired and never renewed, as by a process that was killed.
        await holder.acquire_or_renew()
        ready.set()
        await until(lambda: other.is_held, "the lease passes on")
        assert (holder.token, other.token) == (None, 2)
        document = await leases.find_one({"_id": "service"})

        async def is_renewed() -> bool:
            now = await leases.find_one({"_id": "service"})
            return now["expires_at"] > document["expires_at"]

        await until(is_renewed, "it is renewed")
        assert other.token == 2


async def test_a_write_of_an_older_term_changes_nothing(
    leases: Collection, mongo_uri: str, mongo_database: str
) -> None:
    async with connect(mongo_uri) as client:
        writes = client[mongo_database]["writes"]
        await writes.insert_one({"_id": 1})
        for token, matched in ((5, 1), (4, 0), (5, 1), (6, 1), (5, 0)):
            done = await writes.update_one({"_id": 1, **fenced(token)}, {"$set": {"fence": token}})
            assert done.matched_count == matched
