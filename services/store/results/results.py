"""Results of jobs: the first recorded result of each job stands, durable when the call returns.

The job's id is the document's `_id`, so MongoDB itself allows one result for each job, whichever instance writes.
Writes go in bulk: 100 documents in one write cost about as much as two single writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime

import pymongo
from google.protobuf.message import DecodeError
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import BulkWriteError, PyMongoError

from mesh.mongo import TIMEOUT_MS, Document, is_timeout, translated
from mesh.process.pauses import Pauses
from mesh.process.tasks import uninterrupted
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S
from services.store import page_token
from services.store.documents import Collections, whole_milliseconds
from services.store.page_token import Position
from services.store.results import generations, result_documents, result_rules
from services.store.results.generations import is_same
from services.store.results.large_responses import LargeResponses
from services.store.results.query_slots import SEARCHES, QuerySlots
from services.store.results.read_gate import UNGATED_BYTES, ReadGate, Reading
from services.store.results.result_filter import WITHOUT_RESPONSE, condition, filter_of, find, is_search, span_ends
from services.store.results.tombstones import is_tombstone
from services.store.results.waiting import Waiters, is_young
from shoal.errors import DataLoss, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal.store.v1.store_pb2 import QueryResultsRequest, Result, ResultFilter

log = logging.getLogger(__name__)

PAGE_BYTES = 64 << 20
"""A page ends before its responses exceed this, so that it fits a message. A larger response has a page of its own."""
# Rate that a slow disk still journals: the timeout of a call grows with its bytes, at 100 MiB by 12 s.
_WRITE_BYTES_PER_S = 8 << 20
_BLOBS_AT_ONCE = 8
# Documents of named jobs read at once, beside the page. Each holds a response of up to SHOAL_STORE_INLINE_BYTES.
_NAMED_AT_ONCE = 32
# Tries of a page: the time of one, and the results of the tenant that it examines, or up to twice as many (None: all).
# Another try follows one that found nothing in its time. Labels beyond the first are in documents of up to 256 KiB.
_TRIES: Sequence[tuple[float | None, int | None]] = ((0.5, None), (1.0, 20_000), (None, 500))
# Documents of a reply that a page takes before other calls go on.
_PAUSED_AFTER = 50
_STANDING_ATTEMPTS = 5
# A single job of a fast model is done in 8 ms, and a read costs the store as much as recording the result.
_SOON_S = 0.02
_DUPLICATE_KEY = 11000


class Results:
    """Records, finds and lists results. Safe beside other instances on the same MongoDB and blobs."""

    def __init__(
        self,
        collections: Collections,
        responses: LargeResponses,
        clock: Callable[[], datetime],
        on_recorded: Callable[[Sequence[Document], Collection[str]], None] = lambda docs, replacing: None,
    ) -> None:
        self._collections = collections
        self._responses = responses
        self._clock = clock
        self.reads = ReadGate()
        """Places for calls that read many or large responses."""
        self.queries, self.searches = QuerySlots(), QuerySlots(SEARCHES)
        self.lookups = QuerySlots(wait_s=WAIT_S)
        """Of reads of single results."""
        self.waiters = Waiters(collections)
        """Calls that wait for results. Use as `async with`."""
        self._on_recorded = on_recorded
        self._pauses = Pauses()

    async def put(self, results: Sequence[Result]) -> list[tuple[bool, Result]]:
        """Record results of jobs that have none. For each: True if recorded, and the standing one without response.

        Raises:
            InvalidArgument: one result is invalid; none is recorded.
            Unavailable: MongoDB is unavailable; any of the results may have been recorded. Put them again.
        """
        result_rules.check_results(results)
        docs = await self._documents(results)
        standing, replacing = await self._first_ones(docs)
        lost = {doc["_id"] for doc in docs if doc["_id"] in standing and not is_same(doc, standing[doc["_id"]])}
        await self._drop(doc for doc in docs if doc["_id"] in lost)
        recorded = [doc for doc in docs if doc["_id"] not in lost]
        self._on_recorded(recorded, replacing)
        if self.waiters.notify(recorded):
            # Callers that wait for these results continue before the caller of `put`.
            await asyncio.sleep(0)
        outcome = ((doc["_id"] not in lost, standing.get(doc["_id"], doc)) for doc in docs)
        return [(recorded, result_documents.result(_without_response(doc))) for recorded, doc in outcome]

    async def get(self, job_id: str, wait_s: float = 0.0, scope: TenantScope = EVERY_TENANT) -> Result:
        """Return the result of a job of the scope; wait up to `wait_s` for it.

        `answer_lost` is set when its answer is damaged.

        Raises:
            NotFound: the job has no result, or retention has removed it.
            ResourceExhausted: too many calls wait.
        """
        result_rules.check_job_id(job_id)
        stored = self._waited_for(job_id, wait_s, scope) if wait_s else self._stored(job_id, scope)
        doc = _checked(job_id, await stored)
        with self.reads.reading(scope.tenant) as reading:
            await reading.take(result_documents.response_bytes(doc))
            found = await self.readable(doc)
        if found.answer_lost:
            # The result may have been removed while it was read.
            _checked(job_id, await self._stored(job_id))
        return found

    async def _stored(self, job_id: str, scope: TenantScope = EVERY_TENANT) -> Document | None:
        with translated(f"reading the result of job {job_id}"):
            async with self.lookups.take(scope.tenant or ""):
                return await uninterrupted(self._collections.results.find_one({"_id": job_id, **scope.condition}))

    async def _waited_for(self, job_id: str, wait_s: float, scope: TenantScope) -> Document | None:
        if is_young(job_id, self._clock()):
            # The result of a new job is mostly recorded within a moment, and then no read is needed.
            soon_s = min(_SOON_S, wait_s)
            wait_s -= soon_s
            with self.waiters.registered(job_id, scope.tenant) as future, contextlib.suppress(TimeoutError):
                if (doc := await self.waiters.wait(future, soon_s)) is not None:
                    return doc
        with self.waiters.registered(job_id, scope.tenant) as future:
            if (doc := await self._stored(job_id, scope)) is not None:
                return doc
            try:
                doc = await self.waiters.wait(future, wait_s)
            except TimeoutError:
                return None
            return doc or await self._stored(job_id, scope)

    async def query(self, query: QueryResultsRequest, scope: TenantScope = EVERY_TENANT) -> tuple[list[Result], str]:
        """Return one page of results of the scope, newest first, and the token of the next page.

        The token is empty on the last page. A page may be short or empty although more results match.

        A damaged answer sets `answer_lost` in its result, and does not affect the other results.

        Raises:
            InvalidArgument: a bad filter, page size or token.
        """
        size = result_rules.check_page_size(query)
        result_filter = filter_of(query)
        result_rules.check_filter(result_filter)
        digest = page_token.filter_digest(result_filter)
        after = page_token.decode(query.page_token, digest) if query.page_token else None
        if query.include_removed and not query.job_ids:
            raise InvalidArgument("include_removed: only with job_ids: removed results are in no other order")
        removed = {"removed_at": {"$exists": True}, **scope.condition} if query.include_removed else None
        with self.reads.reading(query.tenant) as reading:
            docs, end = await self.page(
                result_filter, after, size, reading, omit_response=query.omit_response, removed=removed
            )
            found = await self.all_readable(docs)
        return found, "" if end is None else page_token.encode(end, digest)

    async def whole(self, doc: Document) -> Result:
        """Return the result of a document with its response, which may be read from a blob.

        Raises:
            DataLoss: the response is damaged.
        """
        try:
            result = result_documents.result(doc)
            if ref := result_documents.blob_of(doc):
                result.response.MergeFromString(await self._responses.read(ref))
        except DecodeError as err:
            raise DataLoss(f"job {doc['_id']}: the stored response cannot be read") from err
        return result

    async def all_readable(self, docs: Sequence[Document]) -> list[Result]:
        """Return `readable` of each document. Other calls go on meanwhile."""
        return [await self.readable(doc) async for doc in self._pauses.each(docs)]

    async def readable(self, doc: Document) -> Result:
        """Return the result of a document as far as it can be read. `answer_lost`: why a damaged answer is left out.

        So a damaged answer hides neither the rest of its result nor other results of a page.

        Raises:
            Unavailable, FailedPrecondition: MongoDB or the blobs are unavailable, which says nothing about the answer.
        """
        try:
            return await self.whole(doc)
        except DataLoss as err:
            # Retention may have removed the answer or the result since the document was read.
            now = await self._stored(doc["_id"])
            is_removed = now is None or is_tombstone(now)
            if now is not None and not is_removed and result_documents.blob_of(now) != result_documents.blob_of(doc):
                return await self.readable(now)
            if not is_removed:
                log.error(
                    "job %(job)s: the damaged answer is left out: %(error)s",
                    {"event": "results.answer_damaged", "job": doc["_id"], "error": err.message},
                )
            found = result_documents.result(_without_response(doc))
            found.answer_lost = "the result was removed while it was read" if is_removed else err.message
            return found

    async def page(
        self,
        result_filter: ResultFilter,
        after: Position | None,
        size: int,
        reading: Reading,
        *,
        most_bytes: int = PAGE_BYTES,
        oldest_first: bool = False,
        omit_response: bool = False,
        removed: Document | None = None,
    ) -> tuple[list[Document], Position | None]:
        """Return the documents of one page of `size`, after `after`, and where it ends; None: there are no more.

        The page ends before its responses exceed `most_bytes`; a larger response has a page of its own. It is short, or
        empty, when the query takes long. Large responses are read as part of `reading`. Of named jobs, the page
        includes the tombstones that match `removed`.
        """
        slots = self.searches if is_search(result_filter) else self.queries
        with translated("querying results"):
            async with slots.take(result_filter.tenant):
                # The slot is held, and MongoDB works, for as long as a cancelled query goes on.
                return await uninterrupted(
                    self._page(
                        result_filter,
                        after,
                        size,
                        reading,
                        most_bytes=most_bytes,
                        oldest_first=oldest_first,
                        omit_response=omit_response,
                        removed=removed,
                    )
                )

    async def _page(
        self,
        result_filter: ResultFilter,
        after: Position | None,
        size: int,
        reading: Reading,
        *,
        most_bytes: int,
        oldest_first: bool,
        omit_response: bool,
        removed: Document | None,
    ) -> tuple[list[Document], Position | None]:
        query = self._collections, result_filter, after
        if result_filter.job_ids:
            docs = self._named(result_filter, after, size + 1, oldest_first, omit_response, removed)
            return await self._filled(docs, size, most_bytes, reading)
        for limit_s, span in _TRIES:
            last: Position | None = None
            try:
                if span is not None:
                    last = await _first(span_ends(*query, span, oldest_first=oldest_first), limit_s)
                found = find(*query, oldest_first=oldest_first, omit_response=omit_response, last=last)
                docs = _each(found.limit(size + 1), limit_s)
                page, end = await self._filled(docs, size, most_bytes, reading)
                return page, end or last
            except PyMongoError as err:
                if limit_s is None or not is_timeout(err):
                    raise
        raise AssertionError("the last try has no limit")

    async def _filled(
        self, found: AsyncGenerator[Document, None], size: int, most_bytes: int, reading: Reading
    ) -> tuple[list[Document], Position | None]:
        """Return the next documents for a page, and where it ends; None: there are no more."""
        page: list[Document] = []
        nbytes = 0
        async with aclosing(found) as docs:
            try:
                async for doc in docs:
                    nbytes += result_documents.response_bytes(doc)
                    if len(page) == size or (page and nbytes > most_bytes):
                        return page, position_of(page[-1])
                    page.append(doc)
                    if not len(page) % _PAUSED_AFTER:
                        await self._pauses.pause()
                    if nbytes > UNGATED_BYTES:
                        await reading.take(max(nbytes, most_bytes))
            except PyMongoError as err:
                if not page or not is_timeout(err):
                    raise
                return page, position_of(page[-1])
        return page, None

    async def _named(
        self,
        result_filter: ResultFilter,
        after: Position | None,
        size: int,
        oldest_first: bool,
        omit_response: bool,
        removed: Document | None,
    ) -> AsyncGenerator[Document, None]:
        """Yield the documents of a filter with job ids, in order.

        Their positions (at most 1,000) are sorted here. MongoDB would sort the documents with their responses.
        """
        results = self._collections.results
        position_fields = {"recorded_at": 1, "stood_at": 1}
        query = condition(result_filter)
        if removed is not None:
            query = {"_id": query["_id"], "$or": [query, removed]}
        # With the hint: the planner might scan an index in time order instead.
        positions = [position_of(doc) async for doc in results.find(query, position_fields).hint("_id_")]
        if after is not None:
            positions = [each for each in positions if (each > after if oldest_first else each < after)]
        ids = [each.job_id for each in sorted(positions, reverse=not oldest_first)][:size]
        projection = WITHOUT_RESPONSE if omit_response else None
        for first in range(0, len(ids), _NAMED_AT_ONCE):
            some = ids[first : first + _NAMED_AT_ONCE]
            found = {doc["_id"]: doc async for doc in results.find({"_id": {"$in": some}}, projection)}
            for job_id in some:
                if job_id in found:
                    yield found[job_id]

    async def _documents(self, results: Sequence[Result]) -> list[Document]:
        """Return the documents of results, in order, after their large responses were stored as blobs."""
        recorded_at = whole_milliseconds(self._clock())
        slots, inline = asyncio.Semaphore(_BLOBS_AT_ONCE), self._responses.inline_bytes

        def small(result: Result) -> Document:
            response = result.response.SerializeToString() if result.HasField("response") else None
            return result_documents.document(result, recorded_at, response)

        async def one(result: Result) -> Document:
            if result.response.ByteSize() <= inline:
                return small(result)
            async with slots:
                kept = await self._responses.keep(result.response.SerializeToString())
            return result_documents.document(result, recorded_at, kept)

        if all(result.response.ByteSize() <= inline for result in results):
            # The usual case needs no task for each result.
            return list(map(small, results))
        made = await asyncio.gather(*map(one, results), return_exceptions=True)
        docs = [doc for doc in made if not isinstance(doc, BaseException)]
        for failure in made:
            if isinstance(failure, BaseException):
                await self._drop(docs)
                raise failure
        return docs

    async def _first_ones(self, docs: Sequence[Document]) -> tuple[dict[str, Document], set[str]]:
        """Insert the documents of jobs that have no result.

        Returns the standing documents of the other jobs, and the jobs of which a later generation replaced a failure.
        """
        standing: dict[str, Document] = {}
        replacing: set[str] = set()
        waiting = list(docs)
        limit_s = TIMEOUT_MS / 1000 + sum(map(result_documents.inline_bytes, docs)) / _WRITE_BYTES_PER_S
        for _ in range(_STANDING_ATTEMPTS):
            with translated("recording results"), pymongo.timeout(limit_s):
                if not (conflicts := await self._insert(waiting)):
                    return standing, replacing
                later = [doc for doc in waiting if doc["_id"] in conflicts]
                replacing |= await generations.succeed(self._collections.results, later)
                found = await self._collections.results.find({"_id": {"$in": conflicts}}, WITHOUT_RESPONSE).to_list()
            standing.update({doc["_id"]: doc for doc in found})
            # A conflict that is not found is a concurrent write without a majority yet. It may be rolled back: retry.
            waiting = [doc for doc in waiting if doc["_id"] in conflicts and doc["_id"] not in standing]
            if not waiting:
                return standing, replacing
            await asyncio.sleep(0.05)
        raise Unavailable("recording results: another writer's results are not durable yet: put them again")

    async def _insert(self, docs: Sequence[Document]) -> list[str]:
        """Insert all documents without a conflict. Return the jobs that have a result already."""
        try:
            await self._collections.results.insert_many(docs, ordered=False)
        except BulkWriteError as err:
            failures = err.details.get("writeErrors", [])
            if err.details.get("writeConcernErrors") or any(e["code"] != _DUPLICATE_KEY for e in failures):
                raise
            return [docs[failure["index"]]["_id"] for failure in failures]
        return []

    async def _drop(self, docs: Iterable[Document]) -> None:
        """Remove the blobs of documents that were not recorded. A failed removal only costs space."""
        for doc in docs:
            if ref := result_documents.blob_of(doc):
                with contextlib.suppress(ShoalError):
                    await self._responses.drop(ref)


def _checked(job_id: str, doc: Document | None) -> Document:
    """Return the document of a result. Raises NotFound when there is none or only a tombstone."""
    if doc is None:
        raise NotFound(f"job {job_id}: no result (yet)")
    if is_tombstone(doc):
        raise NotFound(f"job {job_id}: {result_documents.result(doc).message}")
    return doc


def position_of(doc: Document) -> Position:
    """Return the position of a document in the result order."""
    return Position(doc["stood_at"] if "stood_at" in doc else doc["recorded_at"], doc["_id"])


async def _first(cursors: Sequence[AsyncCursor[Document]], limit_s: float | None) -> Position | None:
    """Return the position of the first document that any of the cursors has."""
    for cursor in cursors:
        async with aclosing(_each(cursor, limit_s)) as docs:
            async for doc in docs:
                return position_of(doc)
    return None


async def _each(cursor: AsyncCursor[Document], limit_s: float | None) -> AsyncGenerator[Document, None]:
    """Yield the documents of a query, each reply to which takes `limit_s` at most."""
    async with cursor:
        while True:
            try:
                with pymongo.timeout(limit_s):
                    doc = await anext(cursor)
            except StopAsyncIteration:
                return
            yield doc


def _without_response(doc: Document) -> Document:
    return {key: value for key, value in doc.items() if key not in WITHOUT_RESPONSE}
