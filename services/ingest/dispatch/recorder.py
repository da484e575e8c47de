"""Recorder: ends jobs in bulk. The result goes to the store first, then the job's state follows from the stored result.

    End ──> group ──store.PutResults──> first result ──job.end──> group ──fenced bulk write──> ended

The store keeps the first result of a job for ever. So putting a result again (after a crash, or by a slow worker) is
harmless and returns the first one. While the store or MongoDB is unavailable the result stays in memory and is retried,
under a lease that is still renewed. The dispatcher bounds the jobs that it holds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, TypeAlias

from mesh.rpc.limits import MESSAGE_BYTES
from services.ingest.group_commit import Group
from services.ingest.instance import Instance
from services.ingest.intake.payloads import Payloads
from services.ingest.job import MESSAGE_CHARS, BackToQueue, End, Job, Outcome, end, return_to_queue
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Change, JobStore, UnknownOutcome
from services.ingest.messages import timestamp_of
from shoal.errors import Code, OutOfRange, ShoalError
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

RESULT_ITEMS = 500
RESULT_BYTES = 16 << 20
"""Maximum bytes of one PutResults: far below the limit of a message, so that a call is short."""
MOST_BYTES = MESSAGE_BYTES - (1 << 20)
"""Maximum bytes of one result: the mesh's message limit, less the surrounding message. No retry helps."""
STATE_ITEMS = 1_000
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0
# Errors that a single result may cause: each result is then put alone.
_MAYBE_ONE_RESULT = frozenset({Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS, Code.RESOURCE_EXHAUSTED})
# Final refusals by the store. A half-configured mesh does not return these codes: only the store itself may make a job
# lose its result.
_REFUSED = frozenset({Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE})


class ResultStore(Protocol):
    """Results in the store."""

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End | None]:
        """Record results; return for each the earlier result that the store keeps, or None. Raises ShoalError."""

    async def recorded_ends(self, job_ids: Sequence[str]) -> dict[str, End]:
        """Return the recorded outcomes of these jobs. Raises ShoalError."""


@dataclass(frozen=True, slots=True)
class PendingResult:
    """Result to be recorded, and its trace."""

    result: store_pb2.Result
    traceparent: str


@dataclass(frozen=True, slots=True)
class EndingJob:
    """Job to be ended with `result`, unless the store has an earlier one."""

    job: Job
    result: store_pb2.Result


IsHeld: TypeAlias = Callable[[Job], bool]
"""Returns True while this instance holds the job; otherwise retries stop."""
OnSettled: TypeAlias = Callable[[Sequence[Job]], None]


class Recorder:
    """Writer of results and states. Used as `async with`; the exit waits for writes in flight."""

    def __init__(
        self,
        store: JobStore,
        results: ResultStore,
        payloads: Payloads,
        events: JobEvents,
        instance: Instance,
    ) -> None:
        self._store = store
        self._results = results
        self._payloads = payloads
        self._events = events
        self._clock = instance.clock
        self._instance = instance.name
        self._results_group: Group[PendingResult, End | None] = Group(
            "results",
            self._put,
            max_items=RESULT_ITEMS,
            max_bytes=RESULT_BYTES,
            size=lambda pending: pending.result.ByteSize(),
            sender=lambda pending: pending.result.tenant,
        )
        self._states: Group[Change, None] = Group(
            "job states", self._write, max_items=STATE_ITEMS, max_bytes=1, sender=lambda change: change[0].tenant
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Recorder:
        await self._stack.enter_async_context(self._states)
        await self._stack.enter_async_context(self._results_group)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)

    async def end(self, endings: Sequence[EndingJob], is_held: IsHeld, on_ended: OnSettled) -> None:
        """End held jobs: record their results, then write the states that follow from the stored results.

        Retries until it succeeds or this instance no longer holds the job; the write of a fenced-out holder changes
        nothing. `on_ended` is called with the jobs whose ends are written, as they were before.
        """
        waiting, wait_s = list(endings), _FIRST_WAIT_S
        while waiting := [ending for ending in waiting if is_held(ending.job)]:
            recorded, waiting = await self._record(waiting)
            now = self._clock()
            ended = [(job, end(job, how, self._instance, now)) for job, how in recorded]
            await self._settle(ended, is_held, on_ended)
            if waiting:
                wait_s = await _pause(wait_s)

    async def end_recorded(self, recorded: Sequence[tuple[Job, End]], is_held: IsHeld, on_ended: OnSettled) -> None:
        """End jobs whose results are in the store already."""
        now = self._clock()
        await self._settle([(job, end(job, how, self._instance, now)) for job, how in recorded], is_held, on_ended)

    async def put_back(self, back: Sequence[tuple[Job, BackToQueue]], is_held: IsHeld, on_back: OnSettled) -> None:
        """Return held jobs to the queue."""
        now = self._clock()
        changes = [(job, return_to_queue(job, again, self._instance, now)) for job, again in back]
        await self._settle(changes, is_held, on_back)

    async def _record(self, endings: Sequence[EndingJob]) -> tuple[list[tuple[Job, End]], list[EndingJob]]:
        """Record results. Return the jobs with their stored outcomes, and the jobs that must be retried."""
        outcomes = await self._results_group.put_all(
            [PendingResult(each.result, each.job.traceparent) for each in endings]
        )
        recorded: list[tuple[Job, End]] = []
        left: list[EndingJob] = []
        for ending, outcome in zip(endings, outcomes, strict=True):
            if outcome is None:
                self._events.recorded(ending.job, ending.result)
                recorded.append((ending.job, _end_of(ending.result)))
            elif not isinstance(outcome, ShoalError):
                recorded.append((ending.job, outcome))
            elif _is_refused(outcome) and ending.result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
                log.error(
                    "the store refuses the result of job %(job)s: %(error)s",
                    {"event": "results.refused", "job": ending.job.id, "error": outcome},
                )
                left.append(replace(ending, result=_unstorable(ending.result, outcome)))
            else:
                left.append(ending)
        return recorded, left

    async def _settle(self, changes: Sequence[Change], is_held: IsHeld, on_settled: OnSettled) -> None:
        waiting, wait_s = list(changes), _FIRST_WAIT_S
        while waiting := [change for change in waiting if is_held(change[0])]:
            outcomes = await self._states.put_all(waiting)
            done = [
                before
                for (before, _), outcome in zip(waiting, outcomes, strict=True)
                if not isinstance(outcome, ShoalError)
            ]
            for before in done:
                self._events.changed(before.id)
            on_settled(done)
            # `_write` has logged the failure, once for the group.
            if waiting := [c for c, outcome in zip(waiting, outcomes, strict=True) if isinstance(outcome, ShoalError)]:
                wait_s = await _pause(wait_s)

    async def _put(self, pending: list[PendingResult]) -> Sequence[End | ShoalError | None]:
        if len(pending) == 1 and (too_large := _too_large(pending[0].result)):  # Large ones come alone.
            return [too_large]
        try:
            return await self._put_several(pending)
        except ShoalError as err:
            if len(pending) == 1 or not (_is_refused(err) or err.code in _MAYBE_ONE_RESULT):
                log.warning(
                    "cannot record %(results)d results for now: %(error)s",
                    {"event": "results.not_recorded", "results": len(pending), "error": err},
                )
                raise
            log.warning(
                "the store refused %(results)d results in one call: putting each alone: %(error)s",
                {"event": "results.put_alone", "results": len(pending), "error": err},
            )
        return [await self._put_one(one) for one in pending]

    async def _put_one(self, one: PendingResult) -> End | ShoalError | None:
        try:
            return (await self._put_several([one]))[0]
        except ShoalError as err:
            return err

    async def _put_several(self, pending: Sequence[PendingResult]) -> list[End | None]:
        return await self._results.put([f.result for f in pending], [f.traceparent for f in pending])

    async def _write(self, changes: list[Change]) -> Sequence[None]:
        outcome = await self._store.write_states(changes)
        if isinstance(outcome, UnknownOutcome):
            log.warning(
                "cannot write the states of %(jobs)d jobs for now: %(error)s",
                {"event": "jobs.states_not_written", "jobs": len(changes), "error": outcome.error},
            )
            raise outcome.error
        if fenced := len(changes) - outcome.count:
            log.info(
                "%(fenced)d of %(jobs)d state changes were fenced: other instances hold the jobs",
                {"event": "jobs.fenced", "fenced": fenced, "jobs": len(changes)},
            )
        done = [after.id for _, after in changes if after.is_apart and not after.needs_request]
        # The results of fenced jobs are recorded too, so their payloads are not needed either.
        await self._payloads.drop(done)
        return [None] * len(changes)


_OUTCOMES = {outcome: f"OUTCOME_{outcome.name}" for outcome in Outcome}


def result_of(job: Job, how: End) -> store_pb2.Result:
    """Return the result of `job` with outcome `how`, without a response."""
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


def _end_of(result: store_pb2.Result) -> End:
    return End(Outcome(result.outcome), result.code, result.message, result.generation)


def _too_large(result: store_pb2.Result) -> OutOfRange | None:
    if (nbytes := result.ByteSize()) <= MOST_BYTES:
        return None
    return OutOfRange(f"the result has {nbytes} bytes; a message holds at most {MOST_BYTES}")


def _is_refused(error: ShoalError) -> bool:
    return error.code in _REFUSED


def _unstorable(result: store_pb2.Result, error: ShoalError) -> store_pb2.Result:
    failed = store_pb2.Result()
    failed.CopyFrom(result)
    failed.ClearField("response")
    failed.outcome = store_pb2.Result.OUTCOME_FAILED
    failed.code = Code.FAILED_PRECONDITION
    failed.message = f"the model answered, but the store refuses the result: {error.message}"[:MESSAGE_CHARS]
    return failed


async def _pause(wait_s: float) -> float:
    """Wait with jitter, and return the next wait."""
    await asyncio.sleep(wait_s * random.uniform(0.5, 1))
    return min(wait_s * 2, _LONGEST_WAIT_S)
