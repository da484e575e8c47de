"""One of the instances leads at a time, by a lease in MongoDB whose terms are told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import connect, ensure_collection
from services.ingest.documents import EVER
from services.ingest.leading import LEAD_VALIDATOR, LEADS, Lead, fenced
from tests.ingest.making import Seconds

Collection = AsyncCollection[dict[str, Any]]
TTL_MS = 60_000


@pytest.fixture
async def leads(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collection]:
    async with connect(mongo_uri) as client:
        yield await ensure_collection(client[mongo_database], LEADS, validator=LEAD_VALIDATOR, indexes=[])


def lead(leads: Collection, holder: str, clock: Seconds) -> Lead:
    return Lead(leads, holder, ready=asyncio.Event(), ttl_ms=TTL_MS, renew_ms=1_000, clock=clock)


async def lapse(leads: Collection) -> None:
    await leads.update_one({}, {"$set": {"expires_at": EVER}})


async def test_one_leads_and_goes_on_leading(leads: Collection) -> None:
    clock = Seconds()
    one, other = lead(leads, "$one", clock), lead(leads, "other", clock)
    assert one.token is None
    for _ in range(3):
        await one.stand()
        await other.stand()
        assert (one.token, other.token) == (1, None)


async def test_a_leader_stops_by_its_own_clock(leads: Collection) -> None:
    clock = Seconds()
    one = lead(leads, "one", clock)
    await one.stand()
    clock.now += TTL_MS / 1_000 - 0.01
    assert one.token == 1
    clock.now += 0.01
    assert one.token is None


async def test_every_term_has_a_greater_token(leads: Collection) -> None:
    clock = Seconds()
    one, other = lead(leads, "one", clock), lead(leads, "other", clock)
    await one.stand()
    await lapse(leads)
    await other.stand()
    assert other.token == 2
    await one.stand()
    assert one.token is None
    await lapse(leads)
    await one.stand()
    assert one.token == 3
    await lapse(leads)
    await one.stand()
    assert one.token == 4  # Its own lapsed lease, too, begins a new term: others may have acted in between.


async def test_many_stand_at_once_and_one_leads(leads: Collection) -> None:
    clock = Seconds()
    standing = [lead(leads, f"{n}", clock) for n in range(20)]
    for _ in range(3):
        await asyncio.gather(*(one.stand() for one in standing))
        assert [one.token is not None for one in standing].count(True) == 1


async def test_leaving_resigns(leads: Collection) -> None:
    clock = Seconds()
    ready = asyncio.Event()
    async with Lead(leads, "one", ready=ready, ttl_ms=TTL_MS, renew_ms=1_000, clock=clock) as one:
        await one.stand()
    assert one.token is None
    other = lead(leads, "other", clock)
    await other.stand()
    assert other.token == 2


async def test_an_act_of_an_older_term_changes_nothing(leads: Collection, mongo_uri: str, mongo_database: str) -> None:
    async with connect(mongo_uri) as client:
        acts = client[mongo_database]["acts"]
        await acts.insert_one({"_id": 1})
        for token, matched in ((5, 1), (4, 0), (5, 1), (6, 1), (5, 0)):
            done = await acts.update_one({"_id": 1, **fenced(token)}, {"$set": {"fence": token}})
            assert done.matched_count == matched
