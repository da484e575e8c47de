"""Batch work of one instance: claims duties and chunks while it has capacity, and renews their leases.

    work:   read the active batches ──> due duties ──> a task each
                                   └──> free chunks, tenants in turn, then their batches ──> a task each, up to `slots`
    leases: renew the held leases; stop chunks that are lost, paused or cancelled
    sweep:  remove batches whose retention is over, and chunks without an active batch

Instances share a batch by claiming single chunks; no instance knows of another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType

from mesh.mongo_clock import Clock
from mesh.process.tasks import end
from mesh.rpc.access import Access
from mesh.rpc.places import are_for_others
from services.ingest.batches.batch import (
    EXCLUSIVE_AFTER,
    MAX_TRIES,
    Batch,
    BatchState,
    Chunk,
    ChunkState,
    Duty,
    Ending,
    decide_after_failure,
    duty_of,
    ending_of,
)
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.batch_turns import BatchTurns
from services.ingest.batches.chunk_repository import ChunkCounts, ChunkRepository
from services.ingest.batches.chunk_runner import ChunkProgress, ChunkRunner
from services.ingest.batches.duties import Duties
from services.ingest.batches.row_inference import MODEL_WAIT_S
from services.ingest.job import Lease
from services.ingest.job_access import refusal
from services.ingest.polls import polls
from services.ingest.retention.retention_repository import RetentionRepository
from shoal.errors import DataLoss, Internal, ShoalError, Unavailable

log = logging.getLogger(__name__)

# Concurrent duties, of one tenant 4. Planning reads whole files and competes with running chunks.
_DUTIES = 6
SWEEP_S = 600.0
"""Interval between two sweeps of an instance; concurrent sweeps of several instances are harmless."""
_FIRST_SWEEP_S = 10.0
_RETRY_S = 1.0
# Time to release the held leases at shutdown; the others lapse.
_LAST_WRITES_S = 2.0
_PERSIST_S = 60.0


@dataclass(frozen=True, slots=True)
class _Backoff:
    """Pause in claiming chunks of a batch, until the loop time `until`; the next pause is twice as long."""

    until: float
    for_s: float


_NO_BACKOFF = _Backoff(0.0, 0.5)
_MAX_BACKOFF_S = 10.0
_MAX_BACKOFFS = 1_000


def _is_suspect(chunk: Chunk) -> bool:
    """Return True when the chunk may kill the instances that run it. Such a chunk runs exclusively."""
    return chunk.attempts > EXCLUSIVE_AFTER


@dataclass(slots=True, eq=False)
class _HeldChunk:
    """Chunk that this instance runs."""

    batch: Batch
    chunk: Chunk
    progress: ChunkProgress = field(default_factory=ChunkProgress)
    task: asyncio.Task[None] | None = None

    @property
    def lease(self) -> tuple[Lease, ChunkCounts]:
        assert self.chunk.lease is not None
        return self.chunk.lease, self.progress.now


@dataclass(slots=True, eq=False)
class _HeldDuty:
    """Duty that this instance does."""

    batch: Batch
    task: asyncio.Task[None] | None = None


def _has_place(batch: Batch, held: Collection[_HeldChunk] | Collection[_HeldDuty], most: int) -> bool:
    """Return True when the batch may have one more of `most` places, of which tenants leave some to each other."""
    of_tenant = sum(each.batch.tenant == batch.tenant for each in held)
    return len(held) < most and not (batch.tenant and are_for_others(of_tenant, most - len(held)))


class Batcher:
    """Claims and runs batch work while the `async with` block lasts, once `ready` is set."""

    def __init__(
        self,
        batches: BatchRepository,
        chunks: ChunkRepository,
        duties: Duties,
        runner: ChunkRunner,
        *,
        clock: Clock,
        ready: asyncio.Event,
        slots: int,
        poll_ms: int,
        renew_ms: int,
        retention: RetentionRepository,
        sweep_s: float = SWEEP_S,
        access: Access | None = None,
    ) -> None:
        """`access` decides whether the callers of batches may still run their models; None: they may."""
        self._batches = batches
        self._chunks = chunks
        self._duties = duties
        self._runner = runner
        self._clock = clock
        self._ready = ready
        self._slots = slots
        self._polls = polls(poll_ms)
        self._renew_s = renew_ms / 1000
        self._retention = retention
        self._access = access
        self._sweep_s = sweep_s
        self._next_sweep_s = min(_FIRST_SWEEP_S, sweep_s)
        self._held_chunks: dict[str, _HeldChunk] = {}
        self._held_duties: dict[str, _HeldDuty] = {}
        self._wake = asyncio.Event()
        self._renew_now = asyncio.Event()
        self._backoffs: dict[str, _Backoff] = {}
        self._chunk_turns, self._duty_turns = BatchTurns(), BatchTurns()
        self._next_exclusive: str | None = None
        """Batch whose next chunk waits until no other chunk runs here."""
        self._is_open = True
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Batcher:
        for name, step in (
            ("batch work", self._claim_work),
            ("batch leases", self._renew_leases),
            ("batch sweep", self._sweep),
        ):
            self._tasks.append(asyncio.create_task(self._repeat(name, step), name=name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        await end(*self._tasks)
        chunks, duties = list(self._held_chunks.values()), list(self._held_duties.values())
        tasks = [held.task for held in chunks] + [held_duty.task for held_duty in duties]
        await end(*(task for task in tasks if task is not None))
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WRITES_S):
                for held in chunks:
                    await self._release(held.chunk)
                for held_duty in duties:
                    with suppress(ShoalError):
                        await self._batches.release(held_duty.batch)

    def stop(self) -> None:
        """Claim nothing further."""
        self._is_open = False

    def wake(self) -> None:
        """Check for work and for changed batches immediately."""
        self._wake.set()
        self._renew_now.set()

    async def _repeat(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        await self._ready.wait()
        while True:
            try:
                await step()
            except ShoalError as err:
                log.warning("%(task)s: %(error)s", {"event": "batch.task_retrying", "task": name, "error": err})
                await asyncio.sleep(_RETRY_S)
            except Exception:
                # An unexpected error must not end the loop.
                log.exception("%(task)s", {"event": "batch.task_failed", "task": name})
                await asyncio.sleep(_RETRY_S)

    async def _claim_work(self) -> None:
        """Claim duties and chunks within capacity, then wait until `wake` or the poll interval."""
        self._wake.clear()
        if self._is_open:
            active = await self._batches.active()
            if active:
                self._polls.reset()
            for turns in (self._chunk_turns, self._duty_turns):
                turns.keep(active)
            for batch in sorted(active, key=self._duty_turns.key):
                await self._end_if_refused(batch)
                await self._claim_due_duty(batch)
            await self._claim(active)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._polls.next_s())

    async def _end_if_refused(self, batch: Batch) -> None:
        """End a batch whose caller may not run its model any more. Its running chunks are dropped."""
        if batch.is_ending:
            return
        if (refused := refusal(self._access, batch.caller, batch.model_name)) is not None:
            reason = f"{refused.code.name}: {refused.message}"
            await self._batches.request_end(batch.id, Ending(BatchState.FAILED, reason))
            self._renew_now.set()

    async def _claim_due_duty(self, batch: Batch) -> None:
        is_due = batch.free_at is not None and batch.free_at <= self._clock()
        if not is_due or batch.id in self._held_duties or not _has_place(batch, self._held_duties.values(), _DUTIES):
            return
        duty = duty_of(
            batch,
            is_busy=batch.is_ending and await self._chunks.is_busy(batch.id),
            has_unfinished=batch.is_planned and await self._chunks.has_unfinished(batch.id),
        )
        if duty is None or (claimed := await self._batches.claim_duty(batch.id)) is None:
            return
        self._duty_turns.take(batch)
        held_duty = self._held_duties[batch.id] = _HeldDuty(claimed)
        held_duty.task = asyncio.create_task(self._do(held_duty, duty), name=f"{duty} {batch.id}")

    async def _claim(self, active: list[Batch]) -> None:
        """Claim chunks of tenants in turn and of their batches in turn: neither large nor many batches delay others."""
        runs_exclusive = any(_is_suspect(held.chunk) for held in self._held_chunks.values())
        if runs_exclusive or (self._held_chunks and self._next_exclusive is not None):
            return
        now = asyncio.get_running_loop().time()
        candidates = [
            batch
            for batch in active
            if batch.listing is not None
            and batch.state is BatchState.RUNNING
            and self._backoffs.get(batch.id, _NO_BACKOFF).until <= now
        ]
        first, self._next_exclusive = self._next_exclusive, None
        while candidates and len(self._held_chunks) < self._slots:
            batch = next((one for one in candidates if one.id == first), min(candidates, key=self._chunk_turns.key))
            first = None
            # A slow model's chunks may run for hours: those of one tenant leave room for others.
            if not _has_place(batch, self._held_chunks.values(), self._slots):
                # Nor do its other batches, of which there may be hundreds, have one.
                candidates = [one for one in candidates if one.tenant != batch.tenant]
                continue
            chunk = await self._chunks.claim(batch.id, only_staged=batch.is_ending)
            if chunk is None:
                candidates.remove(batch)
                continue
            if _is_suspect(chunk) and self._held_chunks:
                self._next_exclusive = batch.id
                await self._chunks.release(chunk, is_counted=False)
                return
            self._chunk_turns.take(batch)
            held = self._held_chunks[chunk.id] = _HeldChunk(batch, chunk)
            held.task = asyncio.create_task(self._run(held), name=f"chunk {chunk.id}")
            if _is_suspect(chunk):
                return

    async def _run(self, held: _HeldChunk) -> None:
        try:
            await self._run_chunk(held)
        except ShoalError as err:
            await self._chunk_failed(held, err)
        except Exception as err:
            log.exception("running chunk %(chunk)s", {"event": "batch.chunk_failed", "chunk": held.chunk.id})
            await self._chunk_failed(held, Internal(f"{type(err).__name__}: {err}"[:500]))
        finally:
            # The canceller releases the chunk itself.
            if not _is_cancelled():
                self._held_chunks.pop(held.chunk.id, None)
                self._wake.set()

    async def _run_chunk(self, held: _HeldChunk) -> None:
        batch, chunk = held.batch, held.chunk
        if chunk.state is not ChunkState.STAGED:
            if chunk.attempts > MAX_TRIES:
                times = f"they were started {chunk.attempts - 1} times, and the instance died each time"
                raise DataLoss(f"{_rows(chunk)}: {times}")
            # After a recent failure of the batch, an unavailable model is not waited for.
            model_wait_s = 0.0 if batch.id in self._backoffs else MODEL_WAIT_S
            name, summary, versions = await self._runner.run(batch, chunk, held.progress, model_wait_s)
            if not await self._persist(lambda: self._chunks.stage(chunk, name, summary, versions)):
                return
            chunk = held.chunk = replace(
                chunk, state=ChunkState.STAGED, staged=name, ok=summary.rows, failed=summary.failed
            )
            held.progress.now = ChunkCounts()
        await self._runner.publish(batch, chunk)
        await self._persist(lambda: self._chunks.mark_done(chunk))
        self._backoffs.pop(batch.id, None)

    async def _persist(self, write: Callable[[], Awaitable[bool]]) -> bool:
        """Retry a fenced write while MongoDB is unavailable, so that finished work is kept; the fence rejects a late
        write."""
        give_up_at = asyncio.get_running_loop().time() + _PERSIST_S
        while True:
            try:
                return await write()
            except Unavailable:
                if asyncio.get_running_loop().time() > give_up_at:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def _chunk_failed(self, held: _HeldChunk, error: ShoalError) -> None:
        chunk = held.chunk
        decision = decide_after_failure(chunk.attempts, error, self._clock())
        log.warning(
            "chunk %(chunk)s: %(reason)s",
            {"event": "batch.chunk_retrying", "chunk": chunk.id, "reason": decision.reason},
        )
        if decision.retry_at is not None:
            self._back_off(chunk.batch)
        # A lease that cannot be released lapses.
        with suppress(ShoalError):
            if decision.retry_at is None:
                await self._batches.request_end(chunk.batch, Ending(BatchState.FAILED, decision.reason))
            await self._chunks.release(
                chunk, until=decision.retry_at, is_counted=decision.is_counted, note=decision.reason[:300]
            )

    def _back_off(self, batch_id: str) -> None:
        """Pause claiming chunks of a batch, so that other batches get the capacity."""
        now, known = asyncio.get_running_loop().time(), self._backoffs.get(batch_id, _NO_BACKOFF)
        if known.until > now:
            # Several chunks of the batch failed together.
            return
        for_s = min(2 * known.for_s, _MAX_BACKOFF_S)
        self._backoffs[batch_id] = _Backoff(now + for_s, for_s)
        while len(self._backoffs) > _MAX_BACKOFFS:
            del self._backoffs[next(iter(self._backoffs))]

    async def _do(self, held_duty: _HeldDuty, duty: Duty) -> None:
        batch = held_duty.batch
        try:
            if batch.tries > MAX_TRIES and duty is not Duty.FINISH:
                raise DataLoss(f"its inputs were read {batch.tries - 1} times, and the instance died each time")
            await self._duties.do(batch, duty)
        except ShoalError as err:
            await self._duty_failed(batch, duty, err)
        except Exception as err:
            log.exception(
                "duty %(duty)s of batch %(batch)s", {"event": "batch.duty_failed", "duty": duty, "batch": batch.id}
            )
            await self._duty_failed(batch, duty, Internal(f"{type(err).__name__}: {err}"[:500]))
        finally:
            if not _is_cancelled():
                self._held_duties.pop(batch.id, None)
                self._wake.set()

    async def _duty_failed(self, batch: Batch, duty: Duty, error: ShoalError) -> None:
        decision = decide_after_failure(batch.tries, error, self._clock())
        log.warning(
            "batch %(batch)s: cannot %(duty)s: %(reason)s",
            {"event": "batch.duty_refused", "batch": batch.id, "duty": duty, "reason": decision.reason},
        )
        with suppress(ShoalError):
            if decision.retry_at is None and duty is Duty.FINISH:
                ending = ending_of(batch)
                reason = f"{ending.reason}; its summary could not be written: {decision.reason}"
                state = ending.state if ending.state is not BatchState.SUCCEEDED else BatchState.FAILED
                await self._batches.end(batch, Ending(state, reason))
                return
            if decision.retry_at is None:
                await self._batches.request_end(batch.id, Ending(BatchState.FAILED, decision.reason))
            await self._batches.release(
                batch, until=decision.retry_at, is_counted=decision.is_counted, note=decision.reason[:300]
            )

    async def _renew_leases(self) -> None:
        """Renew the held leases, and stop chunks that are lost, paused or cancelled."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._renew_now.wait(), self._renew_s)
        self._renew_now.clear()
        held = dict(self._held_chunks)
        if held:
            lost = await self._chunks.renew({chunk_id: one.lease for chunk_id, one in held.items()})
            stopped = await self._batches.stopped(list({one.batch.id for one in held.values()}))
            for chunk_id, one in held.items():
                if chunk_id in lost or (one.batch.id in stopped and one.chunk.state is not ChunkState.STAGED):
                    await self._drop(one)
        for held_duty in list(self._held_duties.values()):
            if not await self._batches.renew(held_duty.batch) and held_duty.task is not None:
                await end(held_duty.task)
                self._held_duties.pop(held_duty.batch.id, None)

    async def _drop(self, held: _HeldChunk) -> None:
        if self._held_chunks.get(held.chunk.id) is not held or held.task is None:
            # The chunk finished meanwhile.
            return
        await end(held.task)
        self._held_chunks.pop(held.chunk.id, None)
        await self._release(held.chunk)
        self._wake.set()

    async def _release(self, chunk: Chunk) -> None:
        with suppress(ShoalError):
            await self._chunks.release(chunk, is_counted=False)

    async def _sweep(self) -> None:
        """Remove batches whose retention is over, and chunks that have no active batch.

        The first sweep runs soon after the start, because the earlier process may have died while it ended a batch.
        """
        await asyncio.sleep(self._next_sweep_s)
        self._next_sweep_s = self._sweep_s
        if removed := await self._batches.remove_ended(await self._retention.read(), self._clock()):
            log.info(
                "removed %(batches)d batches whose retention is over", {"event": "batch.removed", "batches": removed}
            )
        # Chunks are read first: a batch exists before its chunks do.
        with_chunks = await self._chunks.batch_ids()
        for batch_id in with_chunks - await self._batches.filter_active(with_chunks):
            await self._chunks.forget(batch_id)


def _rows(chunk: Chunk) -> str:
    return f"{chunk.entry.url}: rows {chunk.span.row} to {chunk.span.row + chunk.span.rows - 1}"


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
