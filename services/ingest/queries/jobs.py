"""Reads of jobs for clients: one by id, or pages, newest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, decoded, translated
from mesh.process.pauses import Pauses
from mesh.process.tasks import uninterrupted
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.ingest.documents import WITHOUT_REQUEST, job_of
from services.ingest.group_commit import Group
from services.ingest.intake.payloads import Payloads
from services.ingest.job import Job
from services.ingest.job_scan import scan
from services.ingest.queries import page_tokens
from services.ingest.queries.completions import Owned
from services.ingest.ulid import is_ulid
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, ShoalError

PAGE_DEFAULT = 100
PAGE_MOST = 1_000
QUERIES_AT_ONCE = 4
"""Queries for single jobs. Thousands of watchers read at once when their change stream is opened again."""
JOBS_OF_A_QUERY = 32
"""A query for 32 small jobs takes 1.1 ms of CPU, MongoDB's included; 32 queries for one each take 13."""
BYTES_OF_A_QUERY = 128 << 10
"""A job with a long history has up to half a megabyte, and takes milliseconds to be read and sent."""
PAGES_AT_ONCE = 4
"""Each page has up to 1,000 jobs, some megabytes."""
PAYLOADS_AT_ONCE = 6
"""Each request has up to 12 MiB, of which the store and this process hold copies."""

# Tenants with large jobs that are told apart.
_LARGE_MOST = 1_000


@dataclass(frozen=True, slots=True)
class Filter:
    """Filter of jobs or batches; each field that is set narrows it."""

    state: StrEnum | None = None
    model_name: str = ""
    tenant: str = ""

    def query(self) -> Document:
        conditions: Document = {"model_name": self.model_name, "tenant": self.tenant}
        if self.state is not None:
            conditions["state"] = str(self.state)
        return {name: value for name, value in conditions.items() if value}


class Query(Protocol):
    """Selection of jobs."""

    def query(self) -> Document:
        """Return the MongoDB query, without a condition on `_id`, which pages use."""


@dataclass(frozen=True, slots=True)
class Page:
    """Page of jobs, with the token of the next page."""

    jobs: list[Job]
    next_token: str


class Jobs:
    """Reader of jobs. Used as `async with`. Reads of single jobs that wait at the same time share a query."""

    def __init__(self, jobs: AsyncCollection[Document], payloads: Payloads) -> None:
        self._jobs = jobs
        self._payloads = payloads
        # Of tenants with large jobs, the bytes of a job: each of their next queries has fewer.
        self._large: dict[str | None, int] = {}
        self._reads: Group[Owned, Job] = Group(
            "jobs that are read",
            self._read,
            max_items=JOBS_OF_A_QUERY,
            max_bytes=BYTES_OF_A_QUERY,
            size=lambda wanted: self._large.get(wanted[1], 0),
            sender=lambda wanted: wanted[1],
            limit_s=WAIT_S,
            writes=QUERIES_AT_ONCE,
        )
        self._page_turns = TenantTurns(PAGES_AT_ONCE, leaves_room=True)
        self._payload_turns = TenantTurns(PAYLOADS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)
        self.pauses = Pauses()
        """Of calls for pages."""

    async def __aenter__(self) -> Self:
        await self._reads.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._reads.__aexit__(kind, err, tb)

    async def get(self, job_id: str, scope: TenantScope = EVERY_TENANT) -> Job:
        """Return a job of the scope, without its request.

        Raises:
            InvalidArgument: `job_id` is empty. NotFound: no such job. Unavailable: MongoDB is unavailable.
        """
        if not job_id:
            raise InvalidArgument("id: required, and empty")
        if not is_ulid(job_id):
            raise NotFound(f"no job {job_id[:64]!r}: a job id is 26 characters, as Submit returned it")
        return await self._reads.put((job_id, scope.tenant))

    async def _read(self, wanted: list[Owned]) -> Sequence[Job | ShoalError]:
        ids = list({job_id for job_id, _ in wanted})
        jobs: dict[str, Job] = {}
        with translated("reading a job"):
            found = self._jobs.find_raw_batches({"_id": {"$in": ids}}, WITHOUT_REQUEST, batch_size=JOBS_OF_A_QUERY + 1)
            async for document in decoded(found, self._jobs):
                jobs[document["_id"]] = job_of(document)
        self._note_sizes(wanted, jobs)
        return [_owned(jobs.get(job_id), job_id, tenant) for job_id, tenant in wanted]

    def _note_sizes(self, wanted: list[Owned], jobs: Mapping[str, Job]) -> None:
        """Note the sizes of the jobs of tenants with large ones, and forget them some queries later."""
        largest: dict[str | None, int] = {}
        for job_id, tenant in wanted:
            if (job := jobs.get(job_id)) is not None:
                largest[tenant] = max(largest.get(tenant, 0), weight_of(job))
        for tenant, nbytes in largest.items():
            nbytes = max(nbytes, self._large.pop(tenant, 0) * 7 // 8)
            if nbytes > BYTES_OF_A_QUERY // JOBS_OF_A_QUERY:
                self._large[tenant] = nbytes
        if len(self._large) > _LARGE_MOST:
            self._large.clear()

    async def payload(self, job_id: str, scope: TenantScope = EVERY_TENANT) -> bytes:
        """Return the serialised request of a job of the scope.

        Raises:
            InvalidArgument: `job_id` is empty. NotFound: no such job. FailedPrecondition: its request is not kept.
            Unavailable: MongoDB is unavailable.
        """
        job = await self.get(job_id, scope)
        request = None
        # An external payload may exist for a moment after the end of its job.
        if job.needs_request:
            async with self._payload_turns.take(scope.tenant or ""):
                request = await self._request(job, scope)
        if request is None:
            raise FailedPrecondition(
                f"job {job_id} is {job.state}, and its request is not kept: submit with keep_request to keep it"
            )
        return request

    async def _request(self, job: Job, scope: TenantScope) -> bytes | None:
        if job.is_apart:
            return await self._payloads.get(job.id)
        with translated("reading the request of a job"):
            found = self._jobs.find_one({"_id": job.id, **scope.condition}, {"request": 1})
            request = ((await uninterrupted(found)) or {}).get("request")
        return None if request is None else bytes(request)

    async def page(self, selection: Query, size: int, token: str) -> Page:
        """Return a page of jobs, newest first. `size` 0 means 100. A page may be short or empty, and have a next one.

        Raises:
            InvalidArgument: a bad size, or a token of another filter. Unavailable: MongoDB is unavailable.
        """
        if not 0 <= size <= PAGE_MOST:
            raise InvalidArgument(f"page_size: 0 (the default, {PAGE_DEFAULT}) to {PAGE_MOST}, got {size}")
        query = selection.query()
        after = _position(token, query) if token else ""
        with translated("listing jobs"):
            async with self._page_turns.take(str(query.get("tenant", ""))):
                page = await uninterrupted(scan(self._jobs, query, size or PAGE_DEFAULT, after=after, order=-1))
                jobs = [job_of(document) async for document in self.pauses.each(page.documents)]
        next_token = "" if page.end is None else page_tokens.encode([page.end], query)
        return Page(jobs, next_token)


def work_of(transitions: Sized) -> int:
    """Return the number of ordinary jobs that one with these transitions counts as in pauses."""
    return 1 + len(transitions) // 12


def weight_of(job: Job) -> int:
    """Return the approximate size of a job without its request, in bytes."""
    labels = sum(len(key) + len(value) for key, value in job.labels)
    return 500 + 4 * labels + sum(100 + len(step.reason) for step in job.transitions)


def _owned(job: Job | None, job_id: str, tenant: str | None) -> Job | NotFound:
    if job is None or tenant not in (None, job.tenant):
        return NotFound(f"no job {job_id!r}")
    return job


def _position(token: str, query: Mapping[str, Any]) -> str:
    match page_tokens.read(token, query):
        case [str(after)] if is_ulid(after):
            return after
    raise page_tokens.bad_token()
