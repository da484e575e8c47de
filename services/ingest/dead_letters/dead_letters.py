"""The dead-letter queue: jobs that are DEAD or FAILED, which keep their requests.

    DEAD, FAILED ──requeue──> QUEUED, as the next generation of the job
                 ──purge────> gone, with the request

Each write demands the job as it was read (its state, and how many steps it had made), so of two who requeue or purge
one letter at once one does it, and the other's write changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.ingest.dead_letters.filters import DeadLetterFilter
from services.ingest.instance import Instance
from services.ingest.intake.payloads import Payloads
from services.ingest.job import DEAD_LETTERS, Job, requeue
from services.ingest.job_events import JobEvents
from services.ingest.job_store import DeadFilter, JobStore
from services.ingest.limits import REASON_CHARS
from services.ingest.queries.jobs import Jobs, Page
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, ShoalError


@dataclass(frozen=True, slots=True)
class DeadLetterOutcome:
    """What was done: to which jobs, to which not and why, and whether more may match."""

    ids: list[str]
    refused: dict[str, ShoalError]
    more: bool


class DeadLetters:
    """Lists, requeues and removes dead letters."""

    def __init__(self, store: JobStore, jobs: Jobs, payloads: Payloads, events: JobEvents, instance: Instance) -> None:
        self._store = store
        self._jobs = jobs
        self._payloads = payloads
        self._events = events
        self._clock = instance.clock
        self._instance = instance.name

    async def page(self, among: DeadFilter, size: int, token: str) -> Page:
        """A page of dead letters, newest first.

        Raises:
            InvalidArgument: a bad size or token. Unavailable: MongoDB is away.
        """
        return await self._jobs.page(among, size, token)

    async def requeue(self, selected: DeadLetterFilter, reason: str) -> DeadLetterOutcome:
        """Puts dead letters back into the queue. One that somebody else requeued meanwhile counts as done.

        Raises:
            InvalidArgument: too long a reason. Unavailable: MongoDB is away; some may be requeued: repeat it.
        """
        if len(reason) > REASON_CHARS:
            raise InvalidArgument(f"reason: at most {REASON_CHARS} characters, got {len(reason)}")
        letters, refused = await self._letters(selected)
        now = self._clock()
        again = {letter.id: requeue(letter, reason, self._instance, now) for letter in letters}
        if letters:
            await self._store.requeue([(one, again[one.id]) for one in letters])
        found = await self._store.read(again)
        done = [
            job_id
            for job_id, job in again.items()
            if job_id in found and found[job_id].transition_count >= job.transition_count
        ]
        refused |= {job_id: _gone(job_id) for job_id in again if job_id not in found}
        self._events.due_again([again[job_id] for job_id in done])
        return DeadLetterOutcome(done, refused, selected.filter is not None and len(letters) == selected.limit)

    async def purge(self, selected: DeadLetterFilter) -> DeadLetterOutcome:
        """Removes dead letters with their requests, for good.

        Raises:
            Unavailable: MongoDB is away; some may be removed: repeat it.
        """
        letters, refused = await self._letters(selected)
        ids = [letter.id for letter in letters]
        if ids:
            await self._store.purge(letters)
        left = await self._store.read(ids)
        await self._payloads.drop([letter.id for letter in letters if letter.is_apart and letter.id not in left])
        refused |= {job_id: _no_letter(job) for job_id, job in left.items()}
        done = [job_id for job_id in ids if job_id not in left]
        return DeadLetterOutcome(done, refused, selected.filter is not None and len(letters) == selected.limit)

    async def _letters(self, selected: DeadLetterFilter) -> tuple[list[Job], dict[str, ShoalError]]:
        """The dead letters that are meant, and why other jobs that are named are none."""
        if selected.filter is not None:
            return await self._store.dead_letters(selected.filter, selected.limit), {}
        found = await self._store.read(selected.ids)
        letters = [job for job in found.values() if job.state in DEAD_LETTERS]
        refused: dict[str, ShoalError] = {job_id: _gone(job_id) for job_id in selected.ids if job_id not in found}
        refused |= {job.id: _no_letter(job) for job in found.values() if job.state not in DEAD_LETTERS}
        return letters, refused


def _gone(job_id: str) -> ShoalError:
    return NotFound(f"no job {job_id!r}")


def _no_letter(job: Job) -> ShoalError:
    return FailedPrecondition(f"job {job.id} is {job.state}: only jobs that are dead or failed are dead letters")
