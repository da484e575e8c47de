"""MongoDB is gone for a minute, or for 20 s in the short form: every submit is refused in words, in bounded time;
nothing acknowledged is lost; and when it is back, all goes on by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, submit
from tests.long_form import by_form
from tests.mongods import MongoProcess

S = grpc.StatusCode
# Longer than the 10 s without a write after which submits are refused at once.
OUTAGE_S = by_form(20, 60)
TENANTS = ("red", "blue", "")
pytestmark = pytest.mark.timeout(300)


class Producer:
    """Submits one job after the other, and keeps what it was told."""

    def __init__(self, client: Client, tenant: str) -> None:
        self._client = client
        self._tenant = tenant
        self.accepted: list[str] = []
        self.refused: list[tuple[grpc.StatusCode, str, float]] = []
        """With the time that each refusal took."""
        self.is_wanted = True

    async def run(self) -> None:
        while self.is_wanted:
            began = time.monotonic()
            try:
                answer = await self._client.submit(tenant=self._tenant)
            except grpc.aio.AioRpcError as err:
                self.refused.append((err.code(), err.details() or "", time.monotonic() - began))
                wait_ms = int(dict(err.trailing_metadata() or ()).get("retry-after-ms", 50))
                await asyncio.sleep(min(wait_ms, 1_000) / 1000)  # As clients do that are told when to come back.
                continue
            self.accepted.append(answer.job.id)


async def slow_echo(request: Any, context: Any) -> Any:
    await asyncio.sleep(0.005)
    return await echo(request, context)


async def test_mongodb_gone_for_long(tmp_path: Path, own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    own_mesh.infer.model = slow_echo
    with MongoProcess(tmp_path) as mongod:
        await mongod.until_ready()
        processes = [start_ingest(n, mongo=mongod.uri) for n in range(2)]
        for process in processes:
            await process.until_ready()
        clients = [Client(process.address) for process in processes]
        producers = [Producer(clients[n % 2], tenant) for n, tenant in enumerate(TENANTS)]
        working = [asyncio.create_task(producer.run()) for producer in producers]
        await until(lambda: all(len(producer.accepted) > 20 for producer in producers), "jobs coming in")
        gone_at = time.monotonic()
        mongod.kill()
        before = [len(producer.accepted) for producer in producers]
        streamed = asyncio.create_task(acknowledged_once(clients[0]))
        await until(
            lambda: time.monotonic() - gone_at > OUTAGE_S, "the outage is long", within_s=OUTAGE_S + 30, every_s=0.5
        )
        # A write that was under way at the kill may have been acknowledged just before it; none was after.
        assert all(len(producer.accepted) <= count + 1 for producer, count in zip(producers, before, strict=True))
        mongod.start()
        await mongod.until_ready()
        back_with = [len(producer.accepted) for producer in producers]
        await until(
            lambda: all(len(one.accepted) > count for one, count in zip(producers, back_with, strict=True)), "back"
        )
        for producer in producers:
            producer.is_wanted = False
        await asyncio.gather(*working)
        assert await streamed
        for producer in producers:
            assert producer.refused
            for code, words, took_s in producer.refused:
                assert code in (S.UNAVAILABLE, S.RESOURCE_EXHAUSTED)
                assert "MongoDB" in words or "no answer for 10 s" in words
                assert took_s < 20  # Twice what it may take, on a busy machine.
            for job_id in producer.accepted:
                assert (await clients[1].ended(job_id)).state == pb.JOB_STATE_SUCCEEDED
                assert own_mesh.store.results[job_id].outcome == own_mesh.store.results[job_id].OUTCOME_SUCCEEDED
        assert all(process.is_running() for process in processes)
        for client in clients:
            await client.channel.close()


async def acknowledged_once(client: Client) -> bool:
    """A stream whose item is sent again, with its key, until it is acknowledged: then it is one job."""

    async def one() -> AsyncIterator[pb.SubmitStreamRequest]:
        yield pb.SubmitStreamRequest(sequence=1, submit=submit(idempotency_key="during the outage"))

    while True:
        async for answer in client.stub.SubmitStream(one(), timeout=100):
            if not answer.code:
                again = await client.submit(idempotency_key="during the outage")
                return again.existed and again.job.id == answer.job_id
            assert answer.code in (S.UNAVAILABLE.value[0], S.RESOURCE_EXHAUSTED.value[0])
