"""How a job ends: its result goes to the store, then its state follows from the result that stands. Both in bulk.

    End ──> group ──store.PutResults──> what stands ──job.end──> group ──fenced bulk write──> ended

The store keeps the first result of a job for ever, so that putting one again (after a crash, or by a slow worker) is
harmless and tells what stands. While the store or MongoDB is away the result stays in memory and is tried again, under
a lease that goes on being renewed; the dispatcher claims no more than it may hold.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

from pymongo import UpdateOne
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.clock import Clock
from services.ingest.documents import fenced_update
from services.ingest.intake.group import Group
from services.ingest.intake.payloads import Payloads
from services.ingest.job import MESSAGE_CHARS, Again, End, Job, Outcome, end, try_again
from services.ingest.messages import timestamp_of
from shoal.errors import Code, ShoalError
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

RESULT_ITEMS = 500
RESULT_BYTES = 16 << 20
"""Results of one PutResults: far below what a message may hold, so that one call stays short."""
STATE_ITEMS = 1_000
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0
_UNCLEAR = frozenset({Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS, Code.RESOURCE_EXHAUSTED})
# One result may be what the store chokes on: the others are tried without it.
_REFUSED = frozenset({Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE})
# The store says that it will not have this one. Codes that a half-configured mesh may give are not among them: an
# answer is given up only on the store's own word.


class Results(Protocol):
    """The store, as the recorder needs it."""

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End]:
        """Records results, and says of each what stands. Raises ShoalError."""

    async def standing(self, job_ids: Sequence[str]) -> dict[str, End]:
        """The results that stand for these jobs, without their answers. Raises ShoalError."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A result that is to be recorded, and the trace it belongs to."""

    result: store_pb2.Result
    traceparent: str


class Recorder:
    """Ends jobs. Used as `async with`; leaving waits for the writes under way."""

    def __init__(
        self,
        jobs: AsyncCollection[Document],
        results: Results,
        payloads: Payloads,
        *,
        clock: Clock,
        instance: str,
        on_change: Callable[[str], None],
    ) -> None:
        self._jobs = jobs
        self._payloads = payloads
        self._results = results
        self._clock = clock
        self._instance = instance
        self._on_change = on_change
        self._findings: Group[Finding, End] = Group(
            "results", self._put, max_items=RESULT_ITEMS, max_bytes=RESULT_BYTES, size=lambda f: f.result.ByteSize()
        )
        self._states: Group[tuple[Job, Job], None] = Group(
            "job states", self._write, max_items=STATE_ITEMS, max_bytes=1
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Recorder:
        await self._stack.enter_async_context(self._states)
        await self._stack.enter_async_context(self._findings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)

    async def end(self, job: Job, how: End, result: store_pb2.Result | None = None) -> Job:
        """Ends a job that this instance holds: records `result` (or one that says `how`), then the state that follows.

        Returns the job as it ended; a fenced-out holder's last write changes nothing. Tries until it succeeds.
        """
        standing = await self._record(Finding(result or result_of(job, how), job.traceparent))
        ended = end(job, standing, self._instance, self._clock())
        await self._settle(job, ended)
        return ended

    async def end_as(self, job: Job, standing: End) -> Job:
        """Ends a job whose result is known to stand already."""
        ended = end(job, standing, self._instance, self._clock())
        await self._settle(job, ended)
        return ended

    async def put_back(self, job: Job, again: Again) -> None:
        """Lets go of a job that this instance holds: back to the queue."""
        await self._settle(job, try_again(job, again, self._instance, self._clock()))

    async def _record(self, finding: Finding) -> End:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await self._findings.put(finding)
            except ShoalError as err:
                if _is_refused(err) and finding.result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
                    log.error("the store refuses the answer of job %s: %s", finding.result.job_id, err)
                    finding = replace(finding, result=_unstorable(finding.result, err))
                    continue
            wait_s = await _pause(wait_s)

    async def _settle(self, before: Job, after: Job) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                await self._states.put((before, after))
                self._on_change(before.id)
                return
            except ShoalError:  # `_write` has told the log, once for all.
                wait_s = await _pause(wait_s)

    async def _put(self, findings: list[Finding]) -> Sequence[End | ShoalError]:
        try:
            return await self._put_together(findings)
        except ShoalError as err:
            if len(findings) == 1 or not (_is_refused(err) or err.code in _UNCLEAR):
                log.warning("cannot record %d results for now: %s", len(findings), err)
                raise
            log.warning("the store did not take %d results together: trying each alone: %s", len(findings), err)
        return [await self._put_alone(finding) for finding in findings]

    async def _put_alone(self, finding: Finding) -> End | ShoalError:
        try:
            return (await self._put_together([finding]))[0]
        except ShoalError as err:
            return err

    async def _put_together(self, findings: Sequence[Finding]) -> list[End]:
        return await self._results.put([f.result for f in findings], [f.traceparent for f in findings])

    async def _write(self, changes: list[tuple[Job, Job]]) -> Sequence[None]:
        updates: list[UpdateOne] = [fenced_update(before, after) for before, after in changes]
        try:
            with translated("writing the states of jobs"):
                written = await self._jobs.bulk_write(updates, ordered=False)
        except ShoalError as err:
            log.warning("cannot write the states of %d jobs for now: %s", len(updates), err)
            raise
        if fenced := len(updates) - written.matched_count:
            log.info(
                "%d of %d state changes were not ours to make: other instances hold those jobs", fenced, len(updates)
            )
        done = [after.id for _, after in changes if after.is_apart and not after.keeps_request]
        await self._payloads.drop(done)  # Their results stand, whoever holds the jobs now.
        return [None] * len(changes)


_OUTCOMES = {outcome: f"OUTCOME_{outcome.name}" for outcome in Outcome}


def result_of(job: Job, how: End) -> store_pb2.Result:
    """The result of a job that `job`'s holder records, without an answer."""
    return store_pb2.Result(
        job_id=job.id,
        outcome=_OUTCOMES[how.outcome],
        model_name=job.model_name,
        code=how.code,
        message=how.message[:MESSAGE_CHARS],
        generation=job.generation,
        attempt=job.attempts,
        lease_id=job.lease.id if job.lease else "",
        tenant=job.tenant,
        submitted_at=timestamp_of(job.submitted_at),
        labels=dict(job.labels),
    )


def _is_refused(error: ShoalError) -> bool:
    return error.code in _REFUSED


def _unstorable(result: store_pb2.Result, error: ShoalError) -> store_pb2.Result:
    failed = store_pb2.Result()
    failed.CopyFrom(result)
    failed.ClearField("response")
    failed.outcome = store_pb2.Result.OUTCOME_FAILED
    failed.code = Code.FAILED_PRECONDITION
    failed.message = f"the model answered, but the store does not take the answer: {error.message}"[:MESSAGE_CHARS]
    return failed


async def _pause(wait_s: float) -> float:
    """Waits, and says how long to wait the next time."""
    await asyncio.sleep(wait_s * random.uniform(0.5, 1))
    return min(wait_s * 2, _LONGEST_WAIT_S)
