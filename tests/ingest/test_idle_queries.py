"""An idle instance asks MongoDB rarely."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from pymongo import AsyncMongoClient

from tests.ingest.conftest import StartIngest
from tests.ingest.faults import FakeMesh

FOR_S = 6.0


async def test_an_idle_instance_asks_mongodb_at_most_twenty_times_a_second(
    start_ingest: StartIngest, own_mesh: FakeMesh, mongo_uri: str, mongo_database: str
) -> None:
    process = start_ingest()
    await process.until_ready()
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        database = mongo[mongo_database]
        # Its start, and the polls before their interval has grown.
        await asyncio.sleep(2)
        await database.command("profile", 2)
        began = time.monotonic()
        await asyncio.sleep(FOR_S)
        await database.command("profile", 0)
        took_s = time.monotonic() - began
        found = (
            await database["system.profile"].find({"op": {"$in": ["query", "command", "update", "remove"]}}).to_list()
        )
    asked = Counter(one["ns"].partition(".")[2] for one in found)
    assert asked["jobs"] > 0, "the profiler sees its queries"
    # Of the jobs: what is due, what has lapsed or expired, dependencies, the length of the queue.
    assert asked["jobs"] <= 8 * took_s, asked
    assert asked["schedules"] <= 2 * took_s, asked
    assert asked["batches"] <= 2 * took_s, asked
    assert asked.total() <= 20 * took_s, asked
