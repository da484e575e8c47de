"""RunStream as a broker: one client, which outlives the ingest that it talks to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from shoal.client.jobs.job import Ran
from shoal.client.jobs.run_stream import RunStream
from shoal.client.transport.calls import Caller
from shoal.client.transport.retry import RetryPolicy
from shoal.errors import Code, ShoalError
from shoal.inference.v2 import inference_pb2
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.connectors.brokers import MODEL, Received


class Direct:
    """A stream from a client."""

    keeps_order = False

    def __init__(self) -> None:
        self.table: dict[str, dict[str, Any]] = {}
        self._values: list[bytes] = []
        self._news = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._answers: list[Received] = []
        self._dead: list[Received] = []

    def attach(self, address: str, *, max_in_flight: int = 256, tenant: str = "", labels: Any = None) -> None:
        """Talks to the ingest at `address`, and to whichever is there after it."""
        if self._running is None:
            caller = Caller(address, retry=RetryPolicy(attempts=1_000, stream_attempts=1_000, longest_wait_s=0.5))
            running = RunStream(caller, self._source(tenant, labels or {}), window=max_in_flight)
            self._running = asyncio.create_task(self._run(caller, running))

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def publish(self, values: Sequence[bytes]) -> None:
        self._values += values
        self._news.set()

    async def answers(self) -> list[Received]:
        self._check()
        return list(self._answers)

    async def dead(self) -> list[Received]:
        return list(self._dead)

    async def settled(self) -> int:
        self._check()
        return len(self._answers) + len(self._dead)

    def _check(self) -> None:
        assert self._running is None or not self._running.done(), self._running

    async def _run(self, caller: Caller, running: RunStream) -> None:
        try:
            async for ran in running.run():
                self._handle_error(ran)
        finally:
            await caller.close()

    async def _source(self, tenant: str, labels: dict[str, str]) -> AsyncIterator[pb.SubmitRequest | ShoalError]:
        n = 0
        while True:
            while n < len(self._values):
                request = inference_pb2.ModelInferRequest(model_name=MODEL)
                try:
                    request.MergeFromString(self._values[n])
                    request.model_name = MODEL
                except DecodeError:
                    request.Clear()  # A request without a model: as close to no request as this protocol has it.
                yield pb.SubmitRequest(request=request, idempotency_key=f"k{n}", tenant=tenant, labels=labels)
                n += 1
            self._news.clear()
            await self._news.wait()

    def _handle_error(self, ran: Ran) -> None:
        about = {"shoal-job-id": ran.job_id} if ran.job_id else {}
        if ran.error is not None:
            about |= {"shoal-code": Code(ran.error.code).name, "shoal-message": ran.error.message}
            self._dead.append(Received(self._values[ran.index], about))
            return
        assert ran.result is not None
        answer = inference_pb2.ModelInferResponse(
            model_name=ran.result.model_name, model_version=ran.result.model_version, id=ran.result.id
        )
        data = ran.result["y"].item()
        answer.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
        answer.outputs.add(name="y", datatype="BYTES", shape=[1])
        self._answers.append(Received(answer.SerializeToString(), about))
