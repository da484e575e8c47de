"""Stream of job submits: each job is acknowledged once it is durable (see `job_stream`)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from shoal.client.jobs.job import Submitted
from shoal.client.jobs.job_stream import JobStream
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.failures import of_rejection
from shoal.client.transport.retry import is_retried
from shoal.errors import DeadlineExceeded, ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest

if TYPE_CHECKING:
    from shoal.client.transport.transport import Bidi

WINDOW = 1_000
"""Jobs without acknowledgement. The node writes them in groups of up to 500: two groups keep it busy."""

ACK_S = 60.0
"""Timeout of an acknowledgement: longer than an election of the database and the retries of a full backlog."""


class SubmitStream(
    JobStream[ingest.SubmitRequest, ingest.SubmitStreamRequest, ingest.SubmitStreamResponse, Submitted],
):
    """One stream of submits. `run()` yields the acknowledgements, in stream order except for retried jobs."""

    def __init__(
        self,
        caller: Caller,
        source: AsyncIterator[ingest.SubmitRequest | ShoalError],
        *,
        window: int = WINDOW,
        ack_s: float = ACK_S,
    ) -> None:
        super().__init__(caller, source, methods.SUBMIT_STREAM, window=window)
        self._ack_s = ack_s

    def _pending_state(self, submit: ingest.SubmitRequest) -> ingest.SubmitRequest:
        return submit

    def _rejection(self, index: int, error: ShoalError) -> Submitted:
        return Submitted(index, error=error)

    def _next_request(self, outbox: deque[int]) -> ingest.SubmitStreamRequest | None:
        """Return a run of consecutive jobs: as many as there are, up to the node's limit for one message."""
        first, submits = outbox[0], self._pop_message(outbox, self._pending.get, in_a_row=True)
        if not submits:
            return None
        if self._message_jobs == 1:
            return ingest.SubmitStreamRequest(sequence=first, submit=submits[0])
        # A list even for one job: the node acknowledges jobs of a list in batches.
        return ingest.SubmitStreamRequest(sequence=first, submits=submits)

    async def _read(self, call: Bidi[ingest.SubmitStreamResponse]) -> ingest.SubmitStreamResponse | None:
        """Return the next response; None at the end of the stream. The timeout applies only while responses are due."""
        reading = asyncio.ensure_future(super()._read(call))
        try:
            while True:
                due = bool(self._pending)
                await asyncio.wait([reading], timeout=self._ack_s)
                if reading.done():
                    return reading.result()
                if due and self._pending:
                    raise DeadlineExceeded(f"SubmitStream: no acknowledgement within {self._ack_s:g} s")
        finally:
            reading.cancel()

    async def _process(self, response: ingest.SubmitStreamResponse) -> None:
        self._set_message_jobs(response.most_submits)
        for one in response.acknowledgements or (response,):
            pending = self._record_response(one.sequence)
            if pending is not None:
                self._finish(one.sequence, await self._outcome(one, pending))

    async def _outcome(
        self, response: ingest.SubmitStreamResponse | ingest.Acknowledgement, submit: ingest.SubmitRequest
    ) -> Submitted:
        if not response.code:
            return Submitted(response.sequence, response.job_id, response.existed)
        error = of_rejection(response.code, response.message)
        if is_retried(error):
            return await self._submit_unary(response.sequence, submit)
        return self._rejection(response.sequence, error)

    async def _submit_unary(self, index: int, submit: ingest.SubmitRequest) -> Submitted:
        """Retry a job that was rejected for now with a unary call, which waits as the node asks."""
        try:
            response = await self._caller.call(methods.SUBMIT, submit, timeout_s=self._ack_s)
        except ShoalError as err:
            return self._rejection(index, err)
        return Submitted(index, response.job.id, response.existed)
