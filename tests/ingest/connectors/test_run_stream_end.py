"""What a RunStream leaves behind when it ends early: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from services.ingest.connectors import run_stream
from services.ingest.connectors.run_stream import RunStreams
from services.ingest.queries.completions import Ended
from shoal.errors import Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until

BROKEN, SLOW = "01JD8Y3V5M2Q4R6T8W0X2Z4B6D", "01JD8Y3V5M2Q4R6T8W0X2Z4B6E"


class Completions:
    """All jobs have ended. The result of SLOW never comes; that of BROKEN cannot be had, once SLOW's is asked for."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.in_flight = 0

    def watch(self, job_id: str, ended: Callable[[], None], *, is_old: bool = False) -> None:
        ended()

    def forget(self, job_id: str, ended: Callable[[], None]) -> None: ...

    async def result(self, job_id: str) -> Ended:
        if job_id == BROKEN:
            await self.asked.wait()
            raise Unavailable("the store is away")
        self.in_flight += 1
        self.asked.set()
        try:
            return await asyncio.Future()
        finally:
            self.in_flight -= 1


def streams(endings: Completions) -> RunStreams:
    """No job is submitted here: the streams take up old ones."""
    return RunStreams(cast(Any, None), endings, most=1, items=10, all_items=10)


async def test_the_first_error_ends_what_was_fetched_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_stream, "_STORE_OUTAGE_S", -1.0)
    endings = Completions()

    async def requests() -> AsyncIterator[pb.RunStreamRequest]:
        yield pb.RunStreamRequest(sequence=1, job_id=BROKEN)
        yield pb.RunStreamRequest(sequence=2, job_id=SLOW)

    with pytest.raises(Unavailable, match="the store is away"):
        async for _ in streams(endings).serve(requests()):
            pass
    assert endings.asked.is_set()
    assert endings.in_flight == 0


async def test_its_reader_has_ended_when_it_has() -> None:
    endings, is_reading = Completions(), asyncio.Event()
    goodbyes = 0

    async def requests() -> AsyncIterator[pb.RunStreamRequest]:
        nonlocal goodbyes
        try:
            is_reading.set()
            await asyncio.Future()
            yield pb.RunStreamRequest()
        finally:
            for _ in range(10):  # It takes a while.
                await asyncio.sleep(0)
            goodbyes += 1

    async def serve() -> None:
        async with aclosing(streams(endings).serve(requests())) as answers:
            async for _ in answers:
                pass

    serving = asyncio.create_task(serve())
    await until(is_reading.is_set, "a stream that is read")
    serving.cancel()
    await asyncio.wait([serving])
    assert goodbyes == 1
