"""Payloads that no job needs are collected, and no others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from mesh.mongo import connect
from services.ingest.clock import milliseconds
from services.ingest.documents import JOBS, PAYLOADS, document_of
from services.ingest.intake.payloads import Payloads
from services.ingest.job import Job, State
from services.ingest.ulid import Ulids
from tests.ingest.making import START, job

_old = Ulids(lambda: milliseconds(START - timedelta(hours=2)))


def apart(state: State = State.QUEUED, **fields: Any) -> Job:
    return job(id=_old.new(), is_apart=True, request=b"large", state=state, **fields)


async def test_a_sweep(mongo_uri: str, mongo_database: str) -> None:
    async with connect(mongo_uri) as client:
        database = client[mongo_database]
        payloads = Payloads(database)
        needed = [apart(State.QUEUED), apart(State.RUNNING), apart(State.DEAD), apart(State.FAILED)]
        needed.append(apart(State.SUCCEEDED, is_kept=True))
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
