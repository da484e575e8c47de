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
from shoal.errors import ResourceExhausted, Unavailable
from shoal.inference.v2.inference_pb2 import ModelInferResponse
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.breakable import until

BROKEN, SLOW = "01JD8Y3V5M2Q4R6T8W0X2Z4B6D", "01JD8Y3V5M2Q4R6T8W0X2Z4B6E"


class Completions:
    """All jobs have ended. The result of SLOW never comes; that of BROKEN cannot be had, once SLOW's is asked for."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.in_flight = 0

    def watch(self, job_id: str, ended: Callable[[], None], *, is_old: bool = False, tenant: str | None = None) -> None:
        ended()

    def forget(self, job_id: str, ended: Callable[[], None]) -> None: ...

    async def result(self, job_id: str, tenant: str | None = None) -> Ended:
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


class LargeResults(Completions):
    """Jobs that have ended with large results."""

    async def result(self, job_id: str, tenant: str | None = None) -> Ended:
        response = ModelInferResponse(raw_output_contents=[bytes(1 << 20)])
        result = store_pb2.Result(outcome=store_pb2.Result.OUTCOME_SUCCEEDED, response=response)
        return Ended(result)


class CallMemory:
    """Memory of a call with a limit."""

    message_bytes = 0

    def __init__(self, limit: int) -> None:
        self.left = limit

    def hold(self, size: int) -> None:
        if size > self.left:
            raise ResourceExhausted("no room")
        self.left -= size

    hold_response = hold

    def release(self, size: int) -> None:
        self.left += size


async def test_results_that_wait_for_the_client_count_in_the_memory_of_its_call() -> None:
    async def requests() -> AsyncIterator[pb.RunStreamRequest]:
        yield pb.RunStreamRequest(requests=[{"sequence": n, "job_id": BROKEN[:-1] + str(n)} for n in range(6)])

    memory = CallMemory(7 << 20)
    async with aclosing(streams(LargeResults()).serve(requests(), memory)) as answers:
        await anext(answers)
        assert memory.left < 2 << 20
        async for _ in answers:
            pass
    assert memory.left == 7 << 20
    with pytest.raises(ResourceExhausted):
        async for _ in streams(LargeResults()).serve(requests(), CallMemory(5 << 20)):
            pass
