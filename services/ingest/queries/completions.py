"""Completions of jobs: waits for the ends of many jobs, and reads of their results, both in bulk.

    until_ended ─┐                     ┌─ pokes: jobs that changed in this instance
                 ├─> waiting, by job <─┤
    until_ended ─┘        │            └─ a poll of all now and then: other instances end jobs too
                          └──one query for many──> ended? its waiters continue, and read the result with `result`

A poke is only a hint, and may precede the wait for its job: the newest pokes are kept.

A result that this instance records completes the waits for its job immediately, and stays in memory for the waiter:
nothing is queried or read back. The final state of a failed job depends on its policy, which is read with the result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeAlias

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.process.tasks import Background
from services.ingest.group_commit import Group
from services.ingest.job import DEFAULT_POLICY, FINAL, End, Job, Outcome, Policy, State, state_of
from services.ingest.job_fields import decode_policy
from shoal.errors import DataLoss, NotFound, ShoalError
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

# Pokes kept without a waiter: more than the jobs that end between a submit's write and its response.
_POKES_KEPT = 10_000
_QUERIED_AT_ONCE = 1_000
_POLL_S = 0.25
# The poll of all takes at most a tenth of the time: with very many waits, ends by other instances are noticed later.
_REST = 10
_UNAVAILABLE_WAIT_S = 0.5
_RESULTS_AT_ONCE = 100
# As a page of the store: results of more bytes are read once their callers have those before them.
_PAGE_BYTES = 64 << 20
# Bytes of recorded results that are kept for their waiters; further ones are read back from the store.
_RECORDED_BYTES = 16 << 20
_FINAL = sorted(FINAL)

Owned: TypeAlias = tuple[str, str | None]
"""Id of a job, and the tenant that it must have; None: any."""


class ResultReader(Protocol):
    """Results in the store."""

    async def read(self, job_ids: Sequence[str]) -> tuple[dict[str, store_pb2.Result], bool]:
        """Return the recorded results of these jobs, with their responses or `answer_lost`, and True.

        Large results are returned in parts: at least one result, and False. Raises ShoalError.
        """


@dataclass(frozen=True, slots=True)
class Ended:
    """End of a job: the recorded result, with its response."""

    result: store_pb2.Result
    policy: Policy = DEFAULT_POLICY
    """Retry policy of the job, which determines the state of a failed one."""

    @property
    def state(self) -> State:
        """The job's final state, which may not be written yet."""
        return state_of(End(Outcome(self.result.outcome), self.result.code), self.policy)


class Completions(Background):
    """Waits for the ends of jobs, and reads of their results. Used as `async with`."""

    def __init__(self, jobs: AsyncCollection[Document], reader: ResultReader, *, ready: asyncio.Event) -> None:
        self._jobs = jobs
        self._reader = reader
        self._ready = ready
        # No bound of its own: the windows of streams and connectors bound the waits. Each has the tenant that its job
        # must have; None: any.
        self._waiting: dict[str, list[tuple[Callable[[], None], str | None]]] = {}
        self._hinted: set[str] = set()
        self._poked: OrderedDict[str, None] = OrderedDict()
        self._recorded: OrderedDict[str, Ended] = OrderedDict()
        self._recorded_bytes = 0
        self._wake = asyncio.Event()
        self._results: Group[Owned, Ended | None] = Group(
            "results that are read", self._read, max_items=_RESULTS_AT_ONCE, max_bytes=1
        )

    async def __aenter__(self) -> Self:
        await self._results.__aenter__()
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, err, tb)
        await self._results.__aexit__(kind, err, tb)

    def poke(self, job_id: str) -> None:
        """Note that a job changed, maybe to its end."""
        if job_id in self._waiting:
            self._hint(job_id)
            return
        self._poked[job_id] = None
        if len(self._poked) > _POKES_KEPT:
            self._poked.popitem(last=False)

    def recorded(self, job: Job, result: store_pb2.Result) -> None:
        """Complete the waits for a job whose result this instance has just recorded."""
        if result.job_id not in self._waiting:
            return
        self._pop_recorded(result.job_id)
        self._recorded[result.job_id] = Ended(result, job.policy)
        self._recorded_bytes += result.ByteSize()
        # The waiters of the oldest may have disconnected.
        while self._recorded_bytes > _RECORDED_BYTES:
            self._pop_recorded(next(iter(self._recorded)))
        self._notify_waiters(result.job_id)

    def watch(self, job_id: str, ended: Callable[[], None], *, is_old: bool = False, tenant: str | None = None) -> None:
        """Call `ended()` once the job has ended or no longer exists. `is_old`: the job may have ended long ago.

        With `tenant`, a job of another tenant does not exist.
        """
        self._waiting.setdefault(job_id, []).append((ended, tenant))
        if is_old or job_id in self._poked:
            self._poked.pop(job_id, None)
            self._hint(job_id)

    def forget(self, job_id: str, ended: Callable[[], None]) -> None:
        """Drop a watch whose caller will not read the result, before or after `ended` was called."""
        self._unwatch(job_id, ended)
        # A later reader must not get this result: a requeue may have replaced it.
        self._pop_recorded(job_id)

    def _unwatch(self, job_id: str, ended: Callable[[], None]) -> None:
        if (waiting := self._waiting.get(job_id)) is not None:
            waiting[:] = [each for each in waiting if each[0] != ended]
            if not waiting:
                del self._waiting[job_id]

    async def until_ended(self, job_id: str, *, is_old: bool = False) -> None:
        """Wait until the job has ended or no longer exists. The wait has no deadline, as a job has none."""
        ended = asyncio.Event()
        self.watch(job_id, ended.set, is_old=is_old)
        try:
            await ended.wait()
        finally:
            self._unwatch(job_id, ended.set)

    async def result(self, job_id: str, tenant: str | None = None) -> Ended:
        """Return the recorded result, with its response, of a job that has ended.

        Raises:
            NotFound: the store has no result, or no longer, or the job is not of `tenant`.
            DataLoss: its response is damaged.
            ShoalError: the store or MongoDB is unavailable, or the result cannot be read.
        """
        known = self._recorded.get(job_id)
        if known is not None and tenant in (None, known.result.tenant):
            return self._pop_recorded(job_id) or known
        # Callers count the results that they get before further ones are read.
        while (ended := await self._results.put((job_id, tenant))) is None:
            pass
        return ended

    def _pop_recorded(self, job_id: str) -> Ended | None:
        if (ended := self._recorded.pop(job_id, None)) is not None:
            self._recorded_bytes -= ended.result.ByteSize()
        return ended

    def _hint(self, job_id: str) -> None:
        self._hinted.add(job_id)
        self._wake.set()

    async def _run(self) -> None:
        await self._ready.wait()
        next_poll = 0.0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _POLL_S)
            self._wake.clear()
            try:
                await self._settle(list(self._hinted & self._waiting.keys()))
                if time.monotonic() >= next_poll:
                    began = time.monotonic()
                    await self._settle(list(self._waiting))
                    next_poll = time.monotonic() + max(_POLL_S, _REST * (time.monotonic() - began))
            except ShoalError as err:
                log.warning(
                    "cannot query which jobs have ended: %(error)s", {"event": "completions.retrying", "error": err}
                )
                await asyncio.sleep(_UNAVAILABLE_WAIT_S)
            except Exception:
                log.exception("unexpected error while querying ended jobs", {"event": "completions.failed"})
                await asyncio.sleep(_UNAVAILABLE_WAIT_S)

    async def _settle(self, job_ids: list[str]) -> None:
        """Query these jobs, and complete the waits for the ended ones."""
        self._hinted.intersection_update(self._waiting)
        for first in range(0, len(job_ids), _QUERIED_AT_ONCE):
            some = job_ids[first : first + _QUERIED_AT_ONCE]
            # Before the query: a poke during the query counts.
            self._hinted.difference_update(some)
            try:
                unfinished = await self._unfinished(some)
            except ShoalError:
                self._hinted.update(some)
                raise
            for job_id in some:
                if job_id not in unfinished:
                    self._notify_waiters(job_id)
                else:
                    self._notify_strangers(job_id, unfinished[job_id])

    async def _unfinished(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the tenants of the jobs among `job_ids` that have not ended."""
        with translated("querying which jobs have ended"):
            query = {"_id": {"$in": list(job_ids)}, "state": {"$nin": _FINAL}}
            found = self._jobs.find(query, {"_id": 1, "tenant": 1}).hint("_id_")
            return {document["_id"]: document["tenant"] async for document in found}

    def _notify_waiters(self, job_id: str) -> None:
        for ended, _ in self._waiting.pop(job_id, ()):
            ended()

    def _notify_strangers(self, job_id: str, owner: str) -> None:
        """Complete the waits of other tenants than the job's: for them, it does not exist."""
        for ended, tenant in list(self._waiting.get(job_id, ())):
            if tenant not in (None, owner):
                self._unwatch(job_id, ended)
                ended()

    async def _read(self, jobs: list[Owned]) -> Sequence[Ended | ShoalError | None]:
        """Return the end of each job; None for a job whose result is to be read again."""
        read = await self._read_results(jobs)
        results = [each for each in read if isinstance(each, store_pb2.Result)]
        policies = await self._policies([r.job_id for r in results if r.outcome == store_pb2.Result.OUTCOME_FAILED])
        return [
            each if not isinstance(each, store_pb2.Result) else Ended(each, policies.get(each.job_id, DEFAULT_POLICY))
            for each in read
        ]

    async def _policies(self, job_ids: Sequence[str]) -> dict[str, Policy]:
        """Return the retry policies of these jobs, by id, except of jobs that retention has removed."""
        if not job_ids:
            return {}
        with translated("reading the retry policies of jobs"):
            found = self._jobs.find({"_id": {"$in": list(job_ids)}}, {"policy": 1}).hint("_id_")
            return {document["_id"]: decode_policy(document["policy"]) async for document in found}

    async def _read_results(self, jobs: list[Owned]) -> Sequence[store_pb2.Result | ShoalError | None]:
        try:
            found, is_whole = await self._reader.read(list(dict.fromkeys(job_id for job_id, _ in jobs)))
        except ShoalError:
            if len(jobs) == 1:
                raise
            # An error of one result must not affect the others.
            return await self._read_each(jobs)
        return [_kept(job, found) if is_whole or job[0] in found else None for job in jobs]

    async def _read_each(self, jobs: list[Owned]) -> Sequence[store_pb2.Result | ShoalError | None]:
        read: list[store_pb2.Result | ShoalError | None] = []
        size = 0
        for job in jobs:
            result = await self._read_alone(job) if size < _PAGE_BYTES else None
            size += result.ByteSize() if isinstance(result, store_pb2.Result) else 0
            read.append(result)
        return read

    async def _read_alone(self, job: Owned) -> store_pb2.Result | ShoalError:
        try:
            found, _ = await self._reader.read([job[0]])
            return _kept(job, found)
        except ShoalError as err:
            return err


def _no_result(job_id: str) -> NotFound:
    return NotFound(f"the store has no result of job {job_id}: retention removed it, or the job never existed")


def _kept(job: Owned, found: Mapping[str, store_pb2.Result]) -> store_pb2.Result | ShoalError:
    job_id, tenant = job
    result = found.get(job_id)
    if result is None or tenant not in (None, result.tenant):
        return _no_result(job_id)
    if result.HasField("answer_removed_at"):
        return NotFound(f"job {job_id} succeeded; retention has removed its answer since")
    if result.answer_lost:
        return DataLoss(f"job {job_id} succeeded, and its answer is damaged in the store: {result.answer_lost}")
    return result
