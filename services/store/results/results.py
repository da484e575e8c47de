"""Results of jobs: one each, the first that is recorded stands, and it is durable when the call returns.

The job's id is the document's `_id`, so MongoDB itself sees to it that there is one, whoever writes when. Writes go in
bulk: 100 documents in one write cost about as much as two of their own.
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
from pymongo.errors import BulkWriteError

from mesh.mongo import TIMEOUT_MS, Document, translated
from services.store import page_token
from services.store.documents import Collections, whole_milliseconds
from services.store.page_token import Position
from services.store.results import generations, result_documents, result_rules
from services.store.results.generations import is_same
from services.store.results.large_responses import LargeResponses
from services.store.results.result_filter import WITHOUT_RESPONSE, condition, filter_of, find
from services.store.results.tombstones import is_tombstone
from services.store.results.waiting import Waiting, is_young
from shoal.errors import DataLoss, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal.store.v1.store_pb2 import QueryResultsRequest, Result, ResultFilter

log = logging.getLogger(__name__)

PAGE_BYTES = 64 << 20
"""A page ends before its responses exceed this, so that it fits a message. A larger response has a page of its own."""
_WRITE_BYTES_PER_S = 8 << 20
# What a slow disk still journals: 100 MiB of results in one call get so much longer than other operations.
_BLOBS_AT_ONCE = 8
_NAMED_AT_ONCE = 32
# Responses of up to SHOAL_STORE_INLINE_BYTES lie in the documents: so many are held beside the page.
_STANDING_ATTEMPTS = 5
_SOON_S = 0.02
# A lone job of a fast model is done in 8 ms, and a look costs the store as much as recording its result does.
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
        self.waiting = Waiting(collections)
        """The calls that wait for results. Used as `async with`."""
        self._on_recorded = on_recorded

    async def put(self, results: Sequence[Result]) -> list[tuple[bool, Result]]:
        """Records the results of jobs that have none. For each: whether it was, and the one that stands, less response.

        Raises:
            InvalidArgument: one of them is wrong; none is recorded.
            Unavailable: MongoDB is away; any of them may have been recorded. Put them again.
        """
        result_rules.check_results(results)
        docs = await self._documents(results)
        standing, replacing = await self._first_ones(docs)
        lost = {doc["_id"] for doc in docs if doc["_id"] in standing and not is_same(doc, standing[doc["_id"]])}
        await self._drop(doc for doc in docs if doc["_id"] in lost)
        recorded = [doc for doc in docs if doc["_id"] not in lost]
        self._on_recorded(recorded, replacing)
        if self.waiting.recorded(recorded):
            await asyncio.sleep(0)  # Who waits for a result hears of it before the one who brought it.
        outcome = ((doc["_id"] not in lost, standing.get(doc["_id"], doc)) for doc in docs)
        return [(recorded, result_documents.result(_bare(doc))) for recorded, doc in outcome]

    async def get(self, job_id: str, wait_s: float = 0.0) -> Result:
        """One job's result; when it has none yet, waits so long for it. `answer_lost`: its answer is damaged.

        Raises:
            NotFound: the job has none, or retention has removed it.
            ResourceExhausted: too many calls wait.
        """
        result_rules.check_job_id(job_id)
        doc = _standing(job_id, await self._waited_for(job_id, wait_s) if wait_s else await self._stored(job_id))
        found = await self.readable(doc)
        if found.answer_lost:
            _standing(job_id, await self._stored(job_id))  # It may have been removed while it was read.
        return found

    async def _stored(self, job_id: str) -> Document | None:
        with translated(f"reading the result of job {job_id}"):
            return await self._collections.results.find_one({"_id": job_id})

    async def _waited_for(self, job_id: str, wait_s: float) -> Document | None:
        if is_young(job_id, self._clock()):
            # Its result is not there yet, mostly, and may be in a moment: then nobody need look.
            soon_s = min(_SOON_S, wait_s)
            wait_s -= soon_s
            with self.waiting.for_(job_id) as future, contextlib.suppress(TimeoutError):
                if (doc := await self.waiting.heard(future, soon_s)) is not None:
                    return doc
        with self.waiting.for_(job_id) as future:
            if (doc := await self._stored(job_id)) is not None:
                return doc
            try:
                doc = await self.waiting.heard(future, wait_s)
            except TimeoutError:
                return None
            return doc or await self._stored(job_id)

    async def query(self, query: QueryResultsRequest) -> tuple[list[Result], str]:
        """One page of results, newest first, and the token of the next page (empty on the last).

        Where an answer is damaged, `answer_lost` says so: it hides none of the other results.

        Raises:
            InvalidArgument: a bad filter, page size or token.
        """
        size = result_rules.check_page_size(query)
        wanted = filter_of(query)
        result_rules.check_filter(wanted)
        digest = page_token.filter_digest(wanted)
        after = page_token.decode(query.page_token, digest) if query.page_token else None
        if query.include_removed and not query.job_ids:
            raise InvalidArgument("include_removed: only with job_ids: results that were removed are in no other order")
        docs, more = await self.page(
            wanted, after, size, omit_response=query.omit_response, include_removed=query.include_removed
        )
        found = [await self.readable(doc) for doc in docs]
        if not more:
            return found, ""
        return found, page_token.encode(place_of(docs[-1]), digest)

    async def whole(self, doc: Document) -> Result:
        """The result of a document, its response fetched from where it lies.

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

    async def readable(self, doc: Document) -> Result:
        """The result of a document as far as it can be read: a damaged answer is left out, and `answer_lost` says why.

        So it hides neither what else is known of the job, nor other results from those who read many.

        Raises:
            Unavailable, FailedPrecondition: MongoDB or the blobs are away, which says nothing about the answer.
        """
        try:
            return await self.whole(doc)
        except DataLoss as err:
            now = await self._stored(doc["_id"])  # Retention may have taken it out since the document was read.
            is_gone = now is None or is_tombstone(now)
            if now is not None and not is_gone and result_documents.blob_of(now) != result_documents.blob_of(doc):
                return await self.readable(now)
            if not is_gone:
                log.error("job %s: its answer is passed over: %s", doc["_id"], err.message)
            found = result_documents.result(_bare(doc))
            found.answer_lost = "the result was removed while it was read" if is_gone else err.message
            return found

    async def page(
        self,
        wanted: ResultFilter,
        after: Position | None,
        size: int,
        *,
        most_bytes: int = PAGE_BYTES,
        oldest_first: bool = False,
        omit_response: bool = False,
        include_removed: bool = False,
    ) -> tuple[list[Document], bool]:
        """The documents of one page of `size`, from `after` on, and whether there are more.

        It ends before its responses exceed `most_bytes`; a larger one has a page of its own.
        """
        if wanted.job_ids:
            docs = self._named(wanted, after, size + 1, oldest_first, omit_response, include_removed)
        else:
            found = find(self._collections, wanted, after, oldest_first=oldest_first, omit_response=omit_response)
            docs = _each(found.limit(size + 1))
        page: list[Document] = []
        held = 0
        with translated("querying results"):
            async with aclosing(docs):
                async for doc in docs:
                    held += result_documents.response_bytes(doc)
                    if len(page) == size or (page and held > most_bytes):
                        return page, True
                    page.append(doc)
        return page, False

    async def _named(
        self,
        wanted: ResultFilter,
        after: Position | None,
        size: int,
        oldest_first: bool,
        omit_response: bool,
        include_removed: bool,
    ) -> AsyncGenerator[Document, None]:
        """The documents of a filter with job ids. Their places (at most 1,000) are sorted here: MongoDB would sort the
        documents, responses and all.
        """
        results = self._collections.results
        lean = {"recorded_at": 1, "stood_at": 1}
        where = condition(wanted)
        if include_removed:
            where = {"_id": where["_id"], "$or": [where, {"removed_at": {"$exists": True}}]}
        # The planner might walk an index in time order instead.
        places = [place_of(doc) async for doc in results.find(where, lean).hint("_id_")]
        if after is not None:
            places = [place for place in places if (place > after if oldest_first else place < after)]
        ids = [place.job_id for place in sorted(places, reverse=not oldest_first)][:size]
        projection = WITHOUT_RESPONSE if omit_response else None
        for first in range(0, len(ids), _NAMED_AT_ONCE):
            some = ids[first : first + _NAMED_AT_ONCE]
            found = {doc["_id"]: doc async for doc in results.find({"_id": {"$in": some}}, projection)}
            for job_id in some:
                if job_id in found:
                    yield found[job_id]

    async def _documents(self, results: Sequence[Result]) -> list[Document]:
        """Their documents, in order; large responses are blobs by then."""
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
            return list(map(small, results))  # Nearly always: then none has a task.
        made = await asyncio.gather(*map(one, results), return_exceptions=True)
        docs = [doc for doc in made if not isinstance(doc, BaseException)]
        for failure in made:
            if isinstance(failure, BaseException):
                await self._drop(docs)
                raise failure
        return docs

    async def _first_ones(self, docs: Sequence[Document]) -> tuple[dict[str, Document], set[str]]:
        """Inserts the documents of jobs that have none. Gives the standing ones of those that had one, by job; and
        of which jobs a failure was there when a later generation took its place.
        """
        standing: dict[str, Document] = {}
        replacing: set[str] = set()
        waiting = list(docs)
        limit_s = TIMEOUT_MS / 1000 + sum(map(result_documents.inline_bytes, docs)) / _WRITE_BYTES_PER_S
        for _ in range(_STANDING_ATTEMPTS):
            with translated("recording results"), pymongo.timeout(limit_s):
                if not (taken := await self._insert(waiting)):
                    return standing, replacing
                later = [doc for doc in waiting if doc["_id"] in taken]
                replacing |= await generations.succeed(self._collections.results, later)
                found = await self._collections.results.find({"_id": {"$in": taken}}, WITHOUT_RESPONSE).to_list()
            standing.update({doc["_id"]: doc for doc in found})
            # Taken, yet not found: a rival's write that no majority has yet. It may still be undone: try once more.
            waiting = [doc for doc in waiting if doc["_id"] in taken and doc["_id"] not in standing]
            if not waiting:
                return standing, replacing
            await asyncio.sleep(0.05)
        raise Unavailable("recording results: another writer's results are not durable yet: put them again")

    async def _insert(self, docs: Sequence[Document]) -> list[str]:
        """Inserts all that it can, and gives the jobs that have a result already."""
        try:
            await self._collections.results.insert_many(docs, ordered=False)
        except BulkWriteError as err:
            failures = err.details.get("writeErrors", [])
            if err.details.get("writeConcernErrors") or any(e["code"] != _DUPLICATE_KEY for e in failures):
                raise
            return [docs[failure["index"]]["_id"] for failure in failures]
        return []

    async def _drop(self, docs: Iterable[Document]) -> None:
        """Removes the blobs of documents that were not recorded. One that stays costs space, not truth."""
        for doc in docs:
            if ref := result_documents.blob_of(doc):
                with contextlib.suppress(ShoalError):
                    await self._responses.drop(ref)


def _standing(job_id: str, doc: Document | None) -> Document:
    """The document of a result that is there. Raises NotFound where there is none (any more)."""
    if doc is None:
        raise NotFound(f"job {job_id}: no result (yet)")
    if is_tombstone(doc):
        raise NotFound(f"job {job_id}: {result_documents.result(doc).message}")
    return doc


def place_of(doc: Document) -> Position:
    """Where the result of a document stands among the others."""
    return Position(doc["stood_at"] if "stood_at" in doc else doc["recorded_at"], doc["_id"])


async def _each(cursor: AsyncCursor[Document]) -> AsyncGenerator[Document, None]:
    async with cursor:
        async for doc in cursor:
            yield doc


def _bare(doc: Document) -> Document:
    return {key: value for key, value in doc.items() if key not in WITHOUT_RESPONSE}
