"""One instance's part in the batches: it takes up duties and claims chunks while it has room, and keeps their leases.

    round: look at the active batches ──> duties that are due ──> a task each
                                     └──> free chunks, of the batches in turn ──> a task each, up to `slots`
    keep:  renew what is held; let go of what was lost, paused, cancelled
    sweep: remove the batches that have stayed long enough, and chunks whose batch is not under way

Instances share batches by claiming chunks one at a time; none knows of another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType

from mesh.process.tasks import end
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
from services.ingest.batches.chunk_repository import ChunkCounts, ChunkRepository
from services.ingest.batches.chunk_runner import ChunkProgress, ChunkRunner
from services.ingest.batches.duties import Duties
from services.ingest.batches.row_inference import MODEL_WAIT_S
from services.ingest.clock import Clock
from services.ingest.job import Lease
from services.ingest.retention.book import RetentionRepository
from shoal.errors import DataLoss, Internal, ShoalError, Unavailable

log = logging.getLogger(__name__)

_DUTIES = 4
"""Duties at once: planning reads whole files, and would keep chunks from running."""
SWEEP_S = 600.0
"""Between two sweeps of an instance; several of them do each other no harm."""
_FIRST_SWEEP_S = 10.0
_AWAY_S = 1.0
_LAST_WRITES_S = 2.0
# At the end: to give back what is held. What is not given back lapses.
_PERSIST_S = 60.0


@dataclass(frozen=True, slots=True)
class _Rest:
    """A batch is let alone until then, and the next time for twice as long."""

    until: float
    for_s: float


_NEVER = _Rest(0.0, 0.5)
_LONGEST_REST_S = 10.0
_RESTS_KEPT = 1_000


def _is_suspect(chunk: Chunk) -> bool:
    """Whether it may be what kills those who run it: nothing else is run beside it, to be blamed or spared with it."""
    return chunk.attempts > EXCLUSIVE_AFTER


@dataclass(slots=True, eq=False)
class _Held:
    """A chunk that this instance runs."""

    batch: Batch
    chunk: Chunk
    progress: ChunkProgress = field(default_factory=ChunkProgress)
    task: asyncio.Task[None] | None = None

    @property
    def lease(self) -> tuple[Lease, ChunkCounts]:
        assert self.chunk.lease is not None
        return self.chunk.lease, self.progress.now


@dataclass(slots=True, eq=False)
class _Doing:
    """A duty that this instance does."""

    batch: Batch
    task: asyncio.Task[None] | None = None


class Batcher:
    """Works for as long as the `async with` block lasts, once `ready` is set."""

    def __init__(
        self,
        batches: BatchRepository,
        chunks: ChunkRepository,
        duties: Duties,
        running: ChunkRunner,
        *,
        clock: Clock,
        ready: asyncio.Event,
        slots: int,
        poll_ms: int,
        renew_ms: int,
        retention: RetentionRepository,
        sweep_s: float = SWEEP_S,
    ) -> None:
        self._batches = batches
        self._chunks = chunks
        self._duties = duties
        self._running = running
        self._clock = clock
        self._ready = ready
        self._slots = slots
        self._poll_s = poll_ms / 1000
        self._renew_s = renew_ms / 1000
        self._retention = retention
        self._sweep_s = sweep_s
        self._next_sweep_s = min(_FIRST_SWEEP_S, sweep_s)
        self._held: dict[str, _Held] = {}
        self._doing: dict[str, _Doing] = {}
        self._wake = asyncio.Event()
        self._look = asyncio.Event()
        self._rests: dict[str, _Rest] = {}
        self._turn = 0
        self._next_alone: str | None = None
        """The batch whose next chunk waits until nothing else is run here."""
        self._is_open = True
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Batcher:
        for name, step in (("batch work", self._round), ("batch leases", self._keep), ("batch sweep", self._sweep)):
            self._tasks.append(asyncio.create_task(self._for_ever(name, step), name=name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        await end(*self._tasks)
        held, doing = list(self._held.values()), list(self._doing.values())
        tasks = [one.task for one in held] + [one.task for one in doing]
        await end(*(task for task in tasks if task is not None))
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WRITES_S):
                for one in held:
                    await self._give_back(one.chunk)
                for other in doing:
                    with suppress(ShoalError):
                        await self._batches.release(other.batch)

    def stop(self) -> None:
        """Takes nothing up any more."""
        self._is_open = False

    def wake(self) -> None:
        """Something is new: look at once."""
        self._wake.set()
        self._look.set()

    async def _for_ever(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        await self._ready.wait()
        while True:
            try:
                await step()
            except ShoalError as err:
                log.warning("%s: %s", name, err)
                await asyncio.sleep(_AWAY_S)
            except Exception:
                log.exception("%s", name)  # A fault of ours must not end it.
                await asyncio.sleep(_AWAY_S)

    async def _round(self) -> None:
        """Takes up what there is room for, then waits for news."""
        self._wake.clear()
        if self._is_open:
            active = await self._batches.active()
            for batch in active:
                await self._take_duty(batch)
            await self._claim(active)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._poll_s)

    async def _take_duty(self, batch: Batch) -> None:
        is_due = batch.free_at is not None and batch.free_at <= self._clock()
        if not is_due or batch.id in self._doing or len(self._doing) >= _DUTIES:
            return
        duty = duty_of(
            batch,
            is_busy=batch.is_ending and await self._chunks.is_busy(batch.id),
            has_unfinished=batch.is_planned and await self._chunks.has_unfinished(batch.id),
        )
        if duty is None or (taken := await self._batches.claim_duty(batch.id)) is None:
            return
        doing = self._doing[batch.id] = _Doing(taken)
        doing.task = asyncio.create_task(self._do(doing, duty), name=f"{duty} {batch.id}")

    async def _claim(self, active: list[Batch]) -> None:
        """Claims chunks of the batches in turn, so that a large one does not keep a small one waiting."""
        runs_alone = any(_is_suspect(held.chunk) for held in self._held.values())
        if runs_alone or (self._held and self._next_alone is not None):
            return
        now = asyncio.get_running_loop().time()
        wanting = [
            batch
            for batch in active
            if batch.listing is not None
            and batch.state is BatchState.RUNNING
            and self._rests.get(batch.id, _NEVER).until <= now
        ]
        first, self._next_alone = self._next_alone, None
        while wanting and len(self._held) < self._slots:
            self._turn += 1
            batch = next((one for one in wanting if one.id == first), wanting[self._turn % len(wanting)])
            first = None
            chunk = await self._chunks.claim(batch.id, only_staged=batch.is_ending)
            if chunk is None:
                wanting.remove(batch)
                continue
            if _is_suspect(chunk) and self._held:
                self._next_alone = batch.id
                await self._chunks.release(chunk, is_counted=False)
                return
            held = self._held[chunk.id] = _Held(batch, chunk)
            held.task = asyncio.create_task(self._run(held), name=f"chunk {chunk.id}")
            if _is_suspect(chunk):
                return

    async def _run(self, held: _Held) -> None:
        try:
            await self._run_chunk(held)
        except ShoalError as err:
            await self._broke(held, err)
        except Exception as err:
            log.exception("running chunk %s", held.chunk.id)
            await self._broke(held, Internal(f"{type(err).__name__}: {err}"[:500]))
        finally:
            if not _is_cancelled():  # Who cancels, gives it back.
                self._held.pop(held.chunk.id, None)
                self._wake.set()

    async def _run_chunk(self, held: _Held) -> None:
        batch, chunk = held.batch, held.chunk
        if chunk.state is not ChunkState.STAGED:
            if chunk.attempts > MAX_TRIES:
                times = f"they were begun {chunk.attempts - 1} times, and whoever ran them died each time"
                raise DataLoss(f"{_rows(chunk)}: {times}")
            # A model that was away a moment ago is only tried.
            model_wait_s = 0.0 if batch.id in self._rests else MODEL_WAIT_S
            name, written, versions = await self._running.run(batch, chunk, held.progress, model_wait_s)
            if not await self._persist(lambda: self._chunks.stage(chunk, name, written, versions)):
                return
            chunk = held.chunk = replace(
                chunk, state=ChunkState.STAGED, staged=name, ok=written.rows, failed=written.dead
            )
            held.progress.now = ChunkCounts()
        await self._running.publish(batch, chunk)
        await self._persist(lambda: self._chunks.mark_done(chunk))
        self._rests.pop(batch.id, None)

    async def _persist(self, write: Callable[[], Awaitable[bool]]) -> bool:
        """Writes what is fenced, again while MongoDB is away: work is behind it, and the fence says if it is late."""
        give_up_at = asyncio.get_running_loop().time() + _PERSIST_S
        while True:
            try:
                return await write()
            except Unavailable:
                if asyncio.get_running_loop().time() > give_up_at:
                    raise
                await asyncio.sleep(_AWAY_S)

    async def _broke(self, held: _Held, error: ShoalError) -> None:
        chunk = held.chunk
        how = decide_after_failure(chunk.attempts, error, self._clock())
        log.warning("chunk %s: %s", chunk.id, how.reason)
        if how.again_at is not None:
            self._rest(chunk.batch)
        with suppress(ShoalError):  # Else it lapses.
            if how.again_at is None:
                await self._batches.request_end(chunk.batch, Ending(BatchState.FAILED, how.reason))
            await self._chunks.release(chunk, until=how.again_at, is_counted=how.is_counted, note=how.reason[:300])

    def _rest(self, batch_id: str) -> None:
        """Lets a batch alone for a while, so that those that can be run have the room."""
        now, known = asyncio.get_running_loop().time(), self._rests.get(batch_id, _NEVER)
        if known.until > now:
            return  # Several chunks of it broke together.
        for_s = min(2 * known.for_s, _LONGEST_REST_S)
        self._rests[batch_id] = _Rest(now + for_s, for_s)
        while len(self._rests) > _RESTS_KEPT:
            del self._rests[next(iter(self._rests))]

    async def _do(self, doing: _Doing, duty: Duty) -> None:
        batch = doing.batch
        try:
            if batch.tries > MAX_TRIES and duty is not Duty.FINISH:
                raise DataLoss(f"its inputs were taken up {batch.tries - 1} times, and whoever did so died each time")
            await self._duties.do(batch, duty)
        except ShoalError as err:
            await self._duty_broke(batch, duty, err)
        except Exception as err:
            log.exception("duty %s of batch %s", duty, batch.id)
            await self._duty_broke(batch, duty, Internal(f"{type(err).__name__}: {err}"[:500]))
        finally:
            if not _is_cancelled():
                self._doing.pop(batch.id, None)
                self._wake.set()

    async def _duty_broke(self, batch: Batch, duty: Duty, error: ShoalError) -> None:
        how = decide_after_failure(batch.tries, error, self._clock())
        log.warning("batch %s: cannot %s: %s", batch.id, duty, how.reason)
        with suppress(ShoalError):
            if how.again_at is None and duty is Duty.FINISH:
                ending = ending_of(batch)
                reason = f"{ending.reason}; what came of it could not be written: {how.reason}"
                state = ending.state if ending.state is not BatchState.SUCCEEDED else BatchState.FAILED
                await self._batches.end(batch, Ending(state, reason))
                return
            if how.again_at is None:
                await self._batches.request_end(batch.id, Ending(BatchState.FAILED, how.reason))
            await self._batches.release(batch, until=how.again_at, is_counted=how.is_counted, note=how.reason[:300])

    async def _keep(self) -> None:
        """Renews what is held, and ends what is not to be run any more."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._look.wait(), self._renew_s)
        self._look.clear()
        held = dict(self._held)
        if held:
            lost = await self._chunks.renew({chunk_id: one.lease for chunk_id, one in held.items()})
            stopped = await self._batches.stopped(list({one.batch.id for one in held.values()}))
            for chunk_id, one in held.items():
                if chunk_id in lost or (one.batch.id in stopped and one.chunk.state is not ChunkState.STAGED):
                    await self._drop(one)
        for doing in list(self._doing.values()):
            if not await self._batches.renew(doing.batch) and doing.task is not None:
                await end(doing.task)
                self._doing.pop(doing.batch.id, None)

    async def _drop(self, held: _Held) -> None:
        if self._held.get(held.chunk.id) is not held or held.task is None:
            return  # It has come to its end meanwhile.
        await end(held.task)
        self._held.pop(held.chunk.id, None)
        await self._give_back(held.chunk)
        self._wake.set()

    async def _give_back(self, chunk: Chunk) -> None:
        with suppress(ShoalError):
            await self._chunks.release(chunk, is_counted=False)

    async def _sweep(self) -> None:
        """Removes what ended long ago, and the chunks of batches that are gone, or whose end was broken off.

        Soon after the start too: it may be that this very process was killed at the end of a batch.
        """
        await asyncio.sleep(self._next_sweep_s)
        self._next_sweep_s = self._sweep_s
        if removed := await self._batches.remove_ended(await self._retention.read(), self._clock()):
            log.info("removed %d batches that had stayed long enough", removed)
        # In this order: a batch is there before its chunks are.
        with_chunks = await self._chunks.batch_ids()
        for batch_id in with_chunks - await self._batches.filter_active(with_chunks):
            await self._chunks.forget(batch_id)


def _rows(chunk: Chunk) -> str:
    return f"{chunk.entry.url}: rows {chunk.span.row} to {chunk.span.row + chunk.span.rows - 1}"


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
