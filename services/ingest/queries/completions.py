"""Waiting for many jobs to end, and reading the results that stand: both in bulk, whoever waits for which.

    until_ended ─┐                     ┌─ pokes: jobs that just moved here
                 ├─> waiting, by job <─┤
    until_ended ─┘        │            └─ a look at all of them now and then: other instances end jobs too
                          └──one query for many──> ended? then its waiters go on, and ask `result` for what stands

A poke is only a hint, and may come before its job is waited for: the newest are remembered.

A result that this instance records ends the waiting at once, and is at hand for whoever waited: nothing is asked, and
nothing read back. Which state a failure led to, its job's policy says, which is read with the results that failed.
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
from typing import Protocol, Self

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.process.tasks import Background
from services.ingest.group_commit import Group
from services.ingest.job import DEFAULT_POLICY, FINAL, End, Job, Outcome, Policy, State, state_of
from services.ingest.job_fields import decode_policy
from shoal.errors import DataLoss, NotFound, ShoalError
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

_REMEMBERED = 10_000
# Pokes without a waiter: more than the jobs that end between a submit's write and its answer.
_ASKED_AT_ONCE = 1_000
_LOOK_S = 0.25
_REST = 10
# Looking at all takes at most a tenth of the time: with very many waiting, other instances' ends are seen later.
_UNAVAILABLE_WAIT_S = 0.5
_RESULTS_AT_ONCE = 100
_AT_HAND_BYTES = 16 << 20
# Of results that wait to be fetched by those who waited for them; the rest are read back from the store.
_FINAL = sorted(FINAL)


class Answers(Protocol):
    """The store, as it is asked here."""

    async def whole(self, job_ids: Sequence[str]) -> dict[str, store_pb2.Result]:
        """The results that stand for these jobs, with their answers, or `answer_lost`. Raises ShoalError."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended: the result that stands, with its answer."""

    result: store_pb2.Result
    policy: Policy = DEFAULT_POLICY
    """The job's; it matters only to one that failed."""

    @property
    def state(self) -> State:
        """The job's final state, which may be about to be written."""
        return state_of(End(Outcome(self.result.outcome), self.result.code), self.policy)


class Completions(Background):
    """Tells when jobs have ended, and how. Used as `async with`."""

    def __init__(self, jobs: AsyncCollection[Document], answers: Answers, *, ready: asyncio.Event) -> None:
        self._jobs = jobs
        self._answers = answers
        self._ready = ready
        # No bound of its own: who waits is bounded by the windows of streams and connectors.
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._hinted: set[str] = set()
        self._poked: OrderedDict[str, None] = OrderedDict()
        self._at_hand: OrderedDict[str, Ended] = OrderedDict()
        self._at_hand_bytes = 0
        self._wake = asyncio.Event()
        self._results: Group[str, Ended] = Group(
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
        """The job has moved, maybe to its end."""
        if job_id in self._waiting:
            self._hint(job_id)
            return
        self._poked[job_id] = None
        if len(self._poked) > _REMEMBERED:
            self._poked.popitem(last=False)

    def recorded(self, job: Job, result: store_pb2.Result) -> None:
        """This result of the job stands from now on: it was just recorded here."""
        if result.job_id not in self._waiting:
            return
        self._take_at_hand(result.job_id)
        self._at_hand[result.job_id] = Ended(result, job.policy)
        self._at_hand_bytes += result.ByteSize()
        while self._at_hand_bytes > _AT_HAND_BYTES:  # Whoever waited for the oldest may have gone.
            self._take_at_hand(next(iter(self._at_hand)))
        self._let_go(result.job_id)

    def watch(self, job_id: str, ended: Callable[[], None], *, is_old: bool = False) -> None:
        """Calls `ended()` once the job has ended, or is there no more. `is_old`: it may have ended long ago."""
        self._waiting.setdefault(job_id, []).append(ended)
        if is_old or job_id in self._poked:
            self._poked.pop(job_id, None)
            self._hint(job_id)

    def forget(self, job_id: str, ended: Callable[[], None]) -> None:
        """Nobody is to be called for this any more, nor fetches the result; whether it was called already or not."""
        self._unwatch(job_id, ended)
        self._take_at_hand(job_id)  # By the time that somebody asks, a requeue may have ended otherwise.

    def _unwatch(self, job_id: str, ended: Callable[[], None]) -> None:
        if ended in (waiting := self._waiting.get(job_id, [])):
            waiting.remove(ended)
            if not waiting:
                del self._waiting[job_id]

    async def until_ended(self, job_id: str, *, is_old: bool = False) -> None:
        """Waits until the job has ended, or is there no more; for ever, as a queue may."""
        ended = asyncio.Event()
        self.watch(job_id, ended.set, is_old=is_old)
        try:
            await ended.wait()
        finally:
            self._unwatch(job_id, ended.set)

    async def result(self, job_id: str) -> Ended:
        """The result that stands, with its answer, of a job that has ended.

        Raises:
            NotFound: the store has none (any more). DataLoss: its answer is damaged.
            ShoalError: the store or MongoDB is away, or it cannot be read.
        """
        if (ended := self._take_at_hand(job_id)) is not None:
            return ended
        return await self._results.put(job_id)

    def _take_at_hand(self, job_id: str) -> Ended | None:
        if (ended := self._at_hand.pop(job_id, None)) is not None:
            self._at_hand_bytes -= ended.result.ByteSize()
        return ended

    def _hint(self, job_id: str) -> None:
        self._hinted.add(job_id)
        self._wake.set()

    async def _run(self) -> None:
        await self._ready.wait()
        next_look = 0.0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOOK_S)
            self._wake.clear()
            try:
                await self._settle(list(self._hinted & self._waiting.keys()))
                if time.monotonic() >= next_look:
                    began = time.monotonic()
                    await self._settle(list(self._waiting))
                    next_look = time.monotonic() + max(_LOOK_S, _REST * (time.monotonic() - began))
            except ShoalError as err:
                log.warning("cannot see which jobs have ended, for now: %s", err)
                await asyncio.sleep(_UNAVAILABLE_WAIT_S)
            except Exception:
                log.exception("looking for jobs that have ended")
                await asyncio.sleep(_UNAVAILABLE_WAIT_S)

    async def _settle(self, job_ids: list[str]) -> None:
        """Lets go those who wait for one of these that has ended."""
        self._hinted.intersection_update(self._waiting)
        for first in range(0, len(job_ids), _ASKED_AT_ONCE):
            some = job_ids[first : first + _ASKED_AT_ONCE]
            self._hinted.difference_update(some)  # Before the question: a poke from now on is news.
            try:
                going_on = await self._going_on(some)
            except ShoalError:
                self._hinted.update(some)
                raise
            for job_id in some:
                if job_id not in going_on:
                    self._let_go(job_id)

    async def _going_on(self, job_ids: Sequence[str]) -> set[str]:
        with translated("looking for jobs that have ended"):
            query = {"_id": {"$in": list(job_ids)}, "state": {"$nin": _FINAL}}
            return {document["_id"] async for document in self._jobs.find(query, {"_id": 1}).hint("_id_")}

    def _let_go(self, job_id: str) -> None:
        for ended in self._waiting.pop(job_id, ()):
            ended()

    async def _read(self, job_ids: list[str]) -> Sequence[Ended | ShoalError]:
        read = await self._read_results(job_ids)
        results = [each for each in read if isinstance(each, store_pb2.Result)]
        policies = await self._policies([r.job_id for r in results if r.outcome == store_pb2.Result.OUTCOME_FAILED])
        return [
            each if isinstance(each, ShoalError) else Ended(each, policies.get(each.job_id, DEFAULT_POLICY))
            for each in read
        ]

    async def _policies(self, job_ids: Sequence[str]) -> dict[str, Policy]:
        """The policies of those of these jobs that retention has not removed."""
        if not job_ids:
            return {}
        with translated("reading how jobs are tried again"):
            found = self._jobs.find({"_id": {"$in": list(job_ids)}}, {"policy": 1}).hint("_id_")
            return {document["_id"]: decode_policy(document["policy"]) async for document in found}

    async def _read_results(self, job_ids: list[str]) -> Sequence[store_pb2.Result | ShoalError]:
        try:
            found = await self._answers.whole(list(dict.fromkeys(job_ids)))
        except ShoalError:
            if len(job_ids) == 1:
                raise
            # What is wrong with one is only its own job's.
            return [await self._read_alone(job_id) for job_id in job_ids]
        return [_kept(job_id, found) for job_id in job_ids]

    async def _read_alone(self, job_id: str) -> store_pb2.Result | ShoalError:
        try:
            return _kept(job_id, await self._answers.whole([job_id]))
        except ShoalError as err:
            return err


def _kept(job_id: str, found: Mapping[str, store_pb2.Result]) -> store_pb2.Result | ShoalError:
    result = found.get(job_id)
    if result is None:
        return NotFound(f"the store has no result (any more) of job {job_id}, which has ended or never was")
    if result.HasField("answer_removed_at"):
        return NotFound(f"job {job_id} succeeded; retention has removed its answer since")
    if result.answer_lost:
        return DataLoss(f"job {job_id} succeeded, and its answer is damaged in the store: {result.answer_lost}")
    return result
