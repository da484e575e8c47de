"""A stream of jobs on its way in: each is acknowledged once it is durable (see `job_stream`)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from shoal.client.jobs.job import Submitted
from shoal.client.jobs.job_stream import JobStream
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.failures import of_answer
from shoal.client.transport.retry import is_retried
from shoal.errors import DeadlineExceeded, ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest

if TYPE_CHECKING:
    from shoal.client.transport.transport import Bidi

WINDOW = 1_000
"""Jobs without acknowledgement. The node writes them in groups of up to 500: two of them keep it busy."""

ACK_S = 60.0
"""An acknowledgement waits for the database: a minute outlasts an election and a full backlog's retry."""


class Submission(
    JobStream[ingest.SubmitRequest, ingest.SubmitStreamRequest, ingest.SubmitStreamResponse, Submitted],
):
    """One stream of jobs. `run()` gives the acknowledgements, in the order of the stream but for those tried again."""

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

    def _kept(self, submit: ingest.SubmitRequest) -> ingest.SubmitRequest:
        return submit

    def _refusal(self, index: int, error: ShoalError) -> Submitted:
        return Submitted(index, error=error)

    def _next_request(self, outbox: deque[int]) -> ingest.SubmitStreamRequest | None:
        """A run of jobs that follow each other: as many as there are, up to what the node takes in one message."""
        first, submits = outbox[0], self._filled(outbox, self._pending.get, in_a_row=True)
        if not submits:
            return None
        if self._most == 1:
            return ingest.SubmitStreamRequest(sequence=first, submit=submits[0])
        # Also one by itself: what comes as one of several is acknowledged with others.
        return ingest.SubmitStreamRequest(sequence=first, submits=submits)

    async def _read(self, call: Bidi[ingest.SubmitStreamResponse]) -> ingest.SubmitStreamResponse | None:
        """The next answer; None at the end of the stream. The clock runs only while an answer is due."""
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

    async def _take(self, answer: ingest.SubmitStreamResponse) -> None:
        self._learn(answer.most_submits)
        for one in answer.acknowledgements or (answer,):
            pending = self._answered(one.sequence)
            if pending is not None:
                self._done(one.sequence, await self._outcome(one, pending))

    async def _outcome(
        self, answer: ingest.SubmitStreamResponse | ingest.Acknowledgement, submit: ingest.SubmitRequest
    ) -> Submitted:
        if not answer.code:
            return Submitted(answer.sequence, answer.job_id, answer.existed)
        error = of_answer(answer.code, answer.message)
        if is_retried(error):
            return await self._again(answer.sequence, submit)
        return self._refusal(answer.sequence, error)

    async def _again(self, index: int, submit: ingest.SubmitRequest) -> Submitted:
        """Submits one that was refused for the moment by itself, at the pace that the node asks for."""
        try:
            answer = await self._caller.call(methods.SUBMIT, submit, timeout_s=self._ack_s)
        except ShoalError as err:
            return self._refusal(index, err)
        return Submitted(index, answer.job.id, answer.existed)
