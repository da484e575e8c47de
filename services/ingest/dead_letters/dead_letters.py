"""The dead-letter queue: jobs that are DEAD or FAILED, which keep their requests.

    DEAD, FAILED ──requeue──> QUEUED, as the next generation of the job
                 ──purge────> removed, with the request

Each write applies only to a job with the state and the number of transitions that were read. So of two clients that
requeue or purge one dead letter concurrently, one succeeds, and the other's write changes nothing.

A filter has pages, by id. All pages are of dead letters from before the first page, so each is changed once.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from mesh.mongo_clock import milliseconds
from mesh.process.tasks import uninterrupted
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.ingest.dead_letters.filters import DeadLetterSelection
from services.ingest.instance import Instance
from services.ingest.intake.payloads import Payloads
from services.ingest.job import DEAD_LETTERS, Job, requeue
from services.ingest.job_access import storable_caller
from services.ingest.job_events import JobEvents
from services.ingest.job_store import DeadFilter, JobStore
from services.ingest.limits import REASON_CHARS
from services.ingest.queries import page_tokens
from services.ingest.queries.jobs import Jobs, Page
from services.ingest.ulid import is_ulid
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, ShoalError

CHANGES_AT_ONCE = 4
"""Requeues and purges, each of up to 1,000 jobs, that one instance carries out at a time."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class DeadLetterOutcome:
    """Outcome of a bulk operation: the changed jobs, the errors of others by id, and the token of the next page.

    The token is empty when no more dead letters match.
    """

    ids: list[str]
    refused: dict[str, ShoalError]
    next_token: str


class DeadLetters:
    """Listing, requeueing and removal of dead letters."""

    def __init__(self, store: JobStore, jobs: Jobs, payloads: Payloads, events: JobEvents, instance: Instance) -> None:
        self._store = store
        self._jobs = jobs
        self.pauses = jobs.pauses
        """Of calls for pages."""
        self._payloads = payloads
        self._events = events
        self._clock = instance.clock
        self._instance = instance.name
        self._turns = TenantTurns(CHANGES_AT_ONCE, leaves_room=True, wait_s=WAIT_S)

    async def page(self, filter_: DeadFilter, size: int, token: str) -> Page:
        """Return a page of dead letters, newest first.

        Raises:
            InvalidArgument: a bad size or token. Unavailable: MongoDB is unavailable.
        """
        return await self._jobs.page(filter_, size, token)

    async def requeue(
        self, selected: DeadLetterSelection, reason: str, scope: TenantScope = EVERY_TENANT
    ) -> DeadLetterOutcome:
        """Requeue dead letters of the scope. One that another client requeued meanwhile counts as done.

        The jobs then run for the scope's caller, whose grants decide when they run.

        Raises:
            InvalidArgument: the reason, or the caller's claims are too long.
            Unavailable: MongoDB is unavailable; some may be requeued: repeat.
        """
        if len(reason) > REASON_CHARS:
            raise InvalidArgument(f"reason: at most {REASON_CHARS} characters, got {len(reason)}")
        caller = storable_caller(scope)
        async with self._turns.take(scope.tenant or ""):
            return await uninterrupted(self._requeue(selected, reason, scope, caller))

    async def _requeue(
        self, selected: DeadLetterSelection, reason: str, scope: TenantScope, caller: bytes
    ) -> DeadLetterOutcome:
        letters, refused, next_token = await self._letters(selected, scope)
        now = self._clock()
        requeued = {letter.id: requeue(letter, reason, self._instance, now, caller) for letter in letters}
        if letters:
            await self._store.requeue([(letter, requeued[letter.id]) for letter in letters])
        found = await self._store.read(requeued)
        done = [
            job_id
            for job_id, job in requeued.items()
            if job_id in found and found[job_id].transition_count >= job.transition_count
        ]
        refused |= {job_id: _not_found(job_id) for job_id in requeued if job_id not in found}
        self._events.due_again([requeued[job_id] for job_id in done])
        return DeadLetterOutcome(done, refused, next_token)

    async def purge(self, selected: DeadLetterSelection, scope: TenantScope = EVERY_TENANT) -> DeadLetterOutcome:
        """Remove dead letters of the scope with their requests, permanently.

        Raises:
            Unavailable: MongoDB is unavailable; some may be removed: repeat.
        """
        async with self._turns.take(scope.tenant or ""):
            return await uninterrupted(self._purge(selected, scope))

    async def _purge(self, selected: DeadLetterSelection, scope: TenantScope) -> DeadLetterOutcome:
        letters, refused, next_token = await self._letters(selected, scope)
        ids = [letter.id for letter in letters]
        if ids:
            await self._store.purge(letters)
        left = await self._store.read(ids)
        await self._payloads.drop([letter.id for letter in letters if letter.is_apart and letter.id not in left])
        refused |= {job_id: _not_dead_letter(job) for job_id, job in left.items()}
        done = [job_id for job_id in ids if job_id not in left]
        return DeadLetterOutcome(done, refused, next_token)

    async def _letters(
        self, selected: DeadLetterSelection, scope: TenantScope
    ) -> tuple[list[Job], dict[str, ShoalError], str]:
        """Return the selected dead letters, the errors of selected ids that are none, and the next page's token."""
        if selected.filter is not None:
            return await self._page(selected.filter, selected.limit, selected.page_token)
        found = await self._store.read(selected.ids, scope.tenant)
        letters = [job for job in found.values() if job.state in DEAD_LETTERS]
        refused: dict[str, ShoalError] = {job_id: _not_found(job_id) for job_id in selected.ids if job_id not in found}
        refused |= {job.id: _not_dead_letter(job) for job in found.values() if job.state not in DEAD_LETTERS}
        return letters, refused, ""

    async def _page(self, filter_: DeadFilter, limit: int, token: str) -> tuple[list[Job], dict[str, ShoalError], str]:
        after, began = _position(token, filter_) if token else ("", self._clock())
        # A job that dies again after its requeue is not on a later page, and new dead letters do not add pages.
        before = began if filter_.before is None else min(filter_.before, began)
        letters, end = await self._store.dead_letters(replace(filter_, before=before), limit, after)
        next_token = page_tokens.encode([end, milliseconds(began)], filter_.query()) if end else ""
        return letters, {}, next_token


def _position(token: str, filter_: DeadFilter) -> tuple[str, datetime]:
    """Return the id after which a page begins, and the time of the first page."""
    match page_tokens.read(token, filter_.query()):
        case [str(after), int(began_ms)] if is_ulid(after):
            with suppress(OverflowError):
                return after, _EPOCH + timedelta(milliseconds=began_ms)
    raise page_tokens.bad_token()


def _not_found(job_id: str) -> ShoalError:
    return NotFound(f"no job {job_id!r}")


def _not_dead_letter(job: Job) -> ShoalError:
    return FailedPrecondition(f"job {job.id} is {job.state}: only jobs that are dead or failed are dead letters")
