"""The dead-letter queue: jobs that are DEAD or FAILED, which keep their requests.

    DEAD, FAILED ──requeue──> QUEUED, as the next generation of the job
                 ──purge────> gone, with the request

Each write demands the job as it was read (its state, and how many steps it had made), so of two who requeue or purge
one letter at once one does it, and the other's write changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.clock import Clock
from services.ingest.dead_letters.wanted import DeadFilter, Wanted
from services.ingest.documents import LIGHT, job_of, purging, requeueing
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.submission import REASON_CHARS
from services.ingest.job import DEAD_LETTERS, Job, requeue
from services.ingest.reading.jobs import Jobs, Page
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, ShoalError


@dataclass(frozen=True, slots=True)
class Done:
    """What was done: to which jobs, to which not and why, and whether more may match."""

    ids: list[str]
    refused: dict[str, ShoalError]
    more: bool


class DeadLetters:
    """Lists, requeues and removes dead letters. `on_requeued` hears of those that are in the queue again."""

    def __init__(
        self,
        documents: AsyncCollection[Document],
        jobs: Jobs,
        payloads: Payloads,
        *,
        clock: Clock,
        instance: str,
        on_requeued: Callable[[Sequence[Job]], None],
    ) -> None:
        self._documents = documents
        self._jobs = jobs
        self._payloads = payloads
        self._clock = clock
        self._instance = instance
        self._on_requeued = on_requeued

    async def page(self, among: DeadFilter, size: int, token: str) -> Page:
        """A page of dead letters, newest first.

        Raises:
            InvalidArgument: a bad size or token. Unavailable: MongoDB is away.
        """
        return await self._jobs.page(among, size, token)

    async def requeue(self, wanted: Wanted, reason: str) -> Done:
        """Puts dead letters back into the queue. One that somebody else requeued meanwhile counts as done.

        Raises:
            InvalidArgument: too long a reason. Unavailable: MongoDB is away; some may be requeued: repeat it.
        """
        if len(reason) > REASON_CHARS:
            raise InvalidArgument(f"reason: at most {REASON_CHARS} characters, got {len(reason)}")
        letters, refused = await self._letters(wanted)
        now = self._clock()
        again = {letter.id: requeue(letter, reason, self._instance, now) for letter in letters}
        if letters:
            with translated("requeueing dead letters"):
                await self._documents.bulk_write([requeueing(one, again[one.id]) for one in letters], ordered=False)
        found = await self._read(list(again))
        done = [job_id for job_id, job in again.items() if job_id in found and found[job_id].steps >= job.steps]
        refused |= {job_id: _gone(job_id) for job_id in again if job_id not in found}
        self._on_requeued([again[job_id] for job_id in done])
        return Done(done, refused, wanted.filter is not None and len(letters) == wanted.limit)

    async def purge(self, wanted: Wanted) -> Done:
        """Removes dead letters with their requests, for good.

        Raises:
            Unavailable: MongoDB is away; some may be removed: repeat it.
        """
        letters, refused = await self._letters(wanted)
        ids = [letter.id for letter in letters]
        if ids:
            with translated("purging dead letters"):
                await self._documents.bulk_write([purging(letter) for letter in letters], ordered=False)
        left = await self._read(ids)
        await self._payloads.drop([letter.id for letter in letters if letter.is_apart and letter.id not in left])
        refused |= {job_id: _no_letter(job) for job_id, job in left.items()}
        done = [job_id for job_id in ids if job_id not in left]
        return Done(done, refused, wanted.filter is not None and len(letters) == wanted.limit)

    async def _letters(self, wanted: Wanted) -> tuple[list[Job], dict[str, ShoalError]]:
        """The dead letters that are meant, and why other jobs that are named are none."""
        if wanted.filter is not None:
            with translated("looking for dead letters"):
                cursor = self._documents.find(wanted.filter.query(), LIGHT).sort("_id", 1).limit(wanted.limit)
                return [job_of(document) async for document in cursor], {}
        found = await self._read(wanted.ids)
        letters = [job for job in found.values() if job.state in DEAD_LETTERS]
        refused: dict[str, ShoalError] = {job_id: _gone(job_id) for job_id in wanted.ids if job_id not in found}
        refused |= {job.id: _no_letter(job) for job in found.values() if job.state not in DEAD_LETTERS}
        return letters, refused

    async def _read(self, ids: Sequence[str]) -> dict[str, Job]:
        with translated("looking for dead letters"):
            cursor = self._documents.find({"_id": {"$in": list(ids)}}, LIGHT)
            return {document["_id"]: job_of(document) async for document in cursor}


def _gone(job_id: str) -> ShoalError:
    return NotFound(f"no job {job_id!r}")


def _no_letter(job: Job) -> ShoalError:
    return FailedPrecondition(f"job {job.id} is {job.state}: only jobs that are dead or failed are dead letters")
