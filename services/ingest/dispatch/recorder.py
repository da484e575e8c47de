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
from typing import Protocol, TypeAlias

from mesh.rpc.limits import MESSAGE_BYTES
from services.ingest.group_commit import Group
from services.ingest.instance import Instance
from services.ingest.intake.payloads import Payloads
from services.ingest.job import MESSAGE_CHARS, BackToQueue, End, Job, Outcome, end, return_to_queue
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Change, JobStore, Unknown
from services.ingest.messages import timestamp_of
from shoal.errors import Code, OutOfRange, ShoalError
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

RESULT_ITEMS = 500
RESULT_BYTES = 16 << 20
"""Results of one PutResults: far below what a message may hold, so that one call stays short."""
MOST_BYTES = MESSAGE_BYTES - (1 << 20)
"""Of one result, with room for the message around it: the mesh carries no larger one, however often it is tried."""
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

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End | None]:
        """Records results, and says of each what stands instead of it; None: itself. Raises ShoalError."""

    async def standing(self, job_ids: Sequence[str]) -> dict[str, End]:
        """The results that stand for these jobs, without their answers. Raises ShoalError."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A result that is to be recorded, and the trace it belongs to."""

    result: store_pb2.Result
    traceparent: str


@dataclass(frozen=True, slots=True)
class Ending:
    """A job that is to end with `result`, unless another one stands."""

    job: Job
    result: store_pb2.Result


IsHeld: TypeAlias = Callable[[Job], bool]
"""Whether this instance still holds a job: else there is no point in trying on."""
OnSettled: TypeAlias = Callable[[Sequence[Job]], None]


class Recorder:
    """Ends jobs. Used as `async with`; leaving waits for the writes under way."""

    def __init__(
        self,
        store: JobStore,
        results: Results,
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
        self._findings: Group[Finding, End | None] = Group(
            "results", self._put, max_items=RESULT_ITEMS, max_bytes=RESULT_BYTES, size=lambda f: f.result.ByteSize()
        )
        self._states: Group[Change, None] = Group("job states", self._write, max_items=STATE_ITEMS, max_bytes=1)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Recorder:
        await self._stack.enter_async_context(self._states)
        await self._stack.enter_async_context(self._findings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)

    async def end(self, endings: Sequence[Ending], is_held: IsHeld, on_ended: OnSettled) -> None:
        """Ends jobs that this instance holds: records their results, then the states that follow from what stands.

        Tries until it succeeds, or nobody holds a job any more; a fenced-out holder's last write changes nothing.
        `on_ended` hears of the jobs whose ends are written, as they were before.
        """
        waiting, wait_s = list(endings), _FIRST_WAIT_S
        while waiting := [ending for ending in waiting if is_held(ending.job)]:
            stand, waiting = await self._record(waiting)
            now = self._clock()
            ended = [(job, end(job, standing, self._instance, now)) for job, standing in stand]
            await self._settle(ended, is_held, on_ended)
            if waiting:
                wait_s = await _pause(wait_s)

    async def end_as(self, stand: Sequence[tuple[Job, End]], is_held: IsHeld, on_ended: OnSettled) -> None:
        """Ends jobs whose results are known to stand already."""
        now = self._clock()
        await self._settle([(job, end(job, how, self._instance, now)) for job, how in stand], is_held, on_ended)

    async def put_back(self, back: Sequence[tuple[Job, BackToQueue]], is_held: IsHeld, on_back: OnSettled) -> None:
        """Lets go of jobs that this instance holds: back to the queue."""
        now = self._clock()
        changes = [(job, return_to_queue(job, again, self._instance, now)) for job, again in back]
        await self._settle(changes, is_held, on_back)

    async def _record(self, endings: Sequence[Ending]) -> tuple[list[tuple[Job, End]], list[Ending]]:
        """What stands of each, and those of which it is not known yet."""
        answers = await self._findings.put_all([Finding(each.result, each.job.traceparent) for each in endings])
        stand: list[tuple[Job, End]] = []
        left: list[Ending] = []
        for ending, answer in zip(endings, answers, strict=True):
            if answer is None:
                self._events.recorded(ending.job, ending.result)
                stand.append((ending.job, _end_of(ending.result)))
            elif not isinstance(answer, ShoalError):
                stand.append((ending.job, answer))
            elif _is_refused(answer) and ending.result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
                log.error("the store refuses the answer of job %s: %s", ending.job.id, answer)
                left.append(replace(ending, result=_unstorable(ending.result, answer)))
            else:
                left.append(ending)
        return stand, left

    async def _settle(self, changes: Sequence[Change], is_held: IsHeld, on_settled: OnSettled) -> None:
        waiting, wait_s = list(changes), _FIRST_WAIT_S
        while waiting := [change for change in waiting if is_held(change[0])]:
            answers = await self._states.put_all(waiting)
            done = [
                before
                for (before, _), answer in zip(waiting, answers, strict=True)
                if not isinstance(answer, ShoalError)
            ]
            for before in done:
                self._events.changed(before.id)
            on_settled(done)
            # What failed, `_write` has told the log, once for all.
            if waiting := [c for c, answer in zip(waiting, answers, strict=True) if isinstance(answer, ShoalError)]:
                wait_s = await _pause(wait_s)

    async def _put(self, findings: list[Finding]) -> Sequence[End | ShoalError | None]:
        if len(findings) == 1 and (too_large := _too_large(findings[0].result)):  # Large ones come alone.
            return [too_large]
        try:
            return await self._put_together(findings)
        except ShoalError as err:
            if len(findings) == 1 or not (_is_refused(err) or err.code in _UNCLEAR):
                log.warning("cannot record %d results for now: %s", len(findings), err)
                raise
            log.warning("the store did not take %d results together: trying each alone: %s", len(findings), err)
        return [await self._put_alone(finding) for finding in findings]

    async def _put_alone(self, finding: Finding) -> End | ShoalError | None:
        try:
            return (await self._put_together([finding]))[0]
        except ShoalError as err:
            return err

    async def _put_together(self, findings: Sequence[Finding]) -> list[End | None]:
        return await self._results.put([f.result for f in findings], [f.traceparent for f in findings])

    async def _write(self, changes: list[Change]) -> Sequence[None]:
        outcome = await self._store.write_states(changes)
        if isinstance(outcome, Unknown):
            log.warning("cannot write the states of %d jobs for now: %s", len(changes), outcome.error)
            raise outcome.error
        if fenced := len(changes) - outcome.count:
            log.info(
                "%d of %d state changes were not ours to make: other instances hold those jobs", fenced, len(changes)
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


def _end_of(result: store_pb2.Result) -> End:
    return End(Outcome(result.outcome), result.code, result.message, result.generation)


def _too_large(result: store_pb2.Result) -> OutOfRange | None:
    if (nbytes := result.ByteSize()) <= MOST_BYTES:
        return None
    return OutOfRange(f"it has {nbytes} bytes, of which no message holds more than {MOST_BYTES}")


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
