"""Payloads that no job needs are collected, and no others: here, and what was handed in to the store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from mesh.mongo import connect
from mesh.mongo_clock import milliseconds
from services.ingest.documents import JOBS, PAYLOADS, document_of
from services.ingest.intake.payloads import Payloads
from services.ingest.job import Job, State
from services.ingest.ulid import Ulids
from shoal.errors import Unavailable
from tests.ingest.making import START, job

_old = Ulids(lambda: milliseconds(START - timedelta(hours=2)))


def apart(state: State = State.QUEUED, **fields: Any) -> Job:
    return job(id=_old.new(), is_apart=True, request=b"large", state=state, **fields)


class Handed:
    """A store that takes some requests; others stay in MongoDB."""

    def __init__(self) -> None:
        self.requests: dict[str, bytes] = {}
        self.is_away = False

    async def upload(self, job_id: str, tenant: str, request: bytes) -> str | None:
        if self.is_away:
            return None
        self.requests[job_id] = request
        return hashlib.sha256(request).hexdigest()

    async def fetch(self, job_id: str, sha256: str) -> bytes:
        return self.requests[job_id]

    async def release(self, job_ids: Sequence[str]) -> None:
        if self.is_away:
            raise Unavailable("the store is away")
        for job_id in job_ids:
            self.requests.pop(job_id, None)

    async def list_uploaded(self, before: str) -> AsyncIterator[list[str]]:
        for job_id in sorted(job_id for job_id in self.requests if job_id < before):
            yield [job_id]


async def test_what_was_handed_in_and_lost_sight_of(mongo_uri: str, mongo_database: str) -> None:
    async with connect(mongo_uri) as client:
        database = client[mongo_database]
        store = Handed()
        payloads = Payloads(database, store)
        needed, ended, young = apart(), apart(State.SUCCEEDED), job(is_apart=True)
        await database[JOBS].insert_many([document_of(one) | {"state": str(one.state)} for one in (needed, ended)])
        await payloads.put([needed, ended, young])
        # A kill between the store and MongoDB, on the way in.
        await store.upload(apart().id, "", b"lost")
        # The store was away when the job ended.
        store.is_away = True
        await payloads.drop([ended.id])
        assert len(store.requests) == 4
        store.is_away = False
        assert await payloads.sweep(START) == 2
        assert set(store.requests) == {needed.id, young.id}
        assert await payloads.get(needed.id) == b"large"
        assert await payloads.sweep(START) == 0


@pytest.mark.parametrize("is_away", [False, True], ids=["store", "no store"])
async def test_a_sweep(mongo_uri: str, mongo_database: str, is_away: bool) -> None:
    async with connect(mongo_uri) as client:
        database = client[mongo_database]
        store = Handed()
        store.is_away = is_away
        payloads = Payloads(database, store)
        needed = [apart(State.QUEUED), apart(State.RUNNING), apart(State.DEAD), apart(State.FAILED)]
        needed.append(apart(State.SUCCEEDED, keep_request=True))
        ended = [apart(State.SUCCEEDED), apart(State.CANCELLED), apart(State.EXPIRED)]
        orphans = [apart() for _ in range(600)]
        young = job(is_apart=True)
        await database[JOBS].insert_many([document_of(one) | {"state": str(one.state)} for one in needed + ended])
        await payloads.put([*needed, *ended, *orphans, young, job()])
        assert await payloads.sweep(START) == 603
        left = {document["_id"] async for document in database[PAYLOADS].find({}, {"_id": 1})}
        assert left == {one.id for one in [*needed, young]}
        assert await payloads.get(needed[0].id) == b"large"
        assert await payloads.get(orphans[0].id) is None
        assert await payloads.sweep(START) == 0
        assert set(store.requests) == (set() if is_away else left)


async def test_one_that_fails_ends_the_handing_in_of_the_others(mongo_uri: str, mongo_database: str) -> None:
    first, second = apart(), apart()
    begun, under_way = asyncio.Event(), 0

    class Failing(Handed):
        async def upload(self, job_id: str, tenant: str, request: bytes) -> str | None:
            nonlocal under_way
            if job_id == first.id:
                await begun.wait()
                raise Unavailable("the store is away")
            under_way += 1
            begun.set()
            try:
                return await asyncio.Future()
            finally:
                under_way -= 1

    async with connect(mongo_uri) as client:
        with pytest.raises(Unavailable, match="the store is away"):
            await Payloads(client[mongo_database], Failing()).put([first, second])
    assert begun.is_set()
    assert under_way == 0


async def test_nothing_is_swept_while_a_backup_is_being_restored(mongo_uri: str, mongo_database: str) -> None:
    async with connect(mongo_uri) as client:
        database = client[mongo_database]
        store = Handed()
        payloads = Payloads(database, store)
        one = apart()
        await database["restores"].insert_one({"_id": "20261126T163000Z-1a2b3c4d"})
        await payloads.put([one])  # Its job comes last.
        assert await payloads.sweep(START) == 0
        await database[JOBS].insert_one(document_of(one) | {"state": str(one.state)})
        await database["restores"].delete_many({})
        assert await payloads.sweep(START) == 0
        assert await payloads.get(one.id) == b"large"
