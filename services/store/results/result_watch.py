"""WatchResults: results as they are recorded, with a change stream for each watcher, because positions differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from pymongo.asynchronous.change_stream import AsyncChangeStream
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from mesh import change_tokens, log_reads
from mesh.log_reads import LogReads
from mesh.mongo import Document, next_change, translated
from mesh.process.pauses import Pauses
from mesh.rpc.places import Places
from services.store.documents import Collection, Collections
from services.store.results import result_documents
from services.store.results.result_rules import check_text
from services.store.results.results import Results
from shoal.errors import Unavailable
from shoal.store.v1.store_pb2 import Result, WatchResultsRequest

_AWAIT_MS = 1_000
# Results of one answer of MongoDB, each with a response of up to SHOAL_STORE_INLINE_BYTES: with answers of 16 MB for
# each of 130 watches of a tenant, the store and MongoDB took gigabytes.
_CHANGES_AT_ONCE = 4
# A watch that finds no matching result sends a token this often: a token older than MongoDB's log is useless.
_HEARTBEAT_S = 10.0


class ResultWatch:
    """Opens a bounded number of watches at a time: each occupies a connection to MongoDB most of the time.

    `db` belongs to a client for watches only, so that watches never take the connections of other calls.
    """

    def __init__(
        self, db: AsyncDatabase[Document], collections: Collections, results: Results, max_watches: int
    ) -> None:
        self._db = db
        self._collections = collections
        self._results = results
        self._places = Places(max_watches, "watches")
        self._reads = LogReads()
        self._pauses = Pauses()

    async def follow(self, request: WatchResultsRequest) -> AsyncGenerator[tuple[Result | None, str], None]:
        """Yield (None, token) when the watch is open, then each result and the token to resume after it. Never ends.

        While no result matches, it yields (None, token) with a newer token every ten seconds or so.

        Raises:
            InvalidArgument: a bad filter or token.
            OutOfRange: MongoDB's log no longer contains the token's position.
            ResourceExhausted: too many watches.
            Unavailable: MongoDB became unavailable: resume with the last token.
        """
        pipeline = _pipeline(request)
        after = change_tokens.validated(change_tokens.decode(request.resume_token)) if request.resume_token else None
        with self._places.take(request.tenant), translated("watching results"):
            async for item in self._items(pipeline, after, request.tenant):
                yield item
                del item

    async def token(self) -> str:
        """Return a token for a watch without a gap to reads: the watch shows all results that later reads may lack.

        A watch begins at the newest write, which a majority may not have yet; reads return only what a majority has. A
        result between the two could be missed by both. So this method waits until reads have caught up with the watch.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        collection = self._db[self._collections.results.name]
        with translated("opening a watch of results"):
            async with self._db.client.start_session(causal_consistency=True) as session:
                async with await collection.watch(change_tokens.NOTHING, session=session) as stream:
                    token = _written(stream.resume_token)
                # The time in the response of `watch`.
                if (newest := session.cluster_time) is not None:
                    session.advance_operation_time(newest["clusterTime"])
                await collection.find_one({"_id": ""}, session=session)
        return token

    async def _items(
        self, pipeline: list[Document], after: Document | None, tenant: str
    ) -> AsyncGenerator[tuple[Result | None, str], None]:
        collection, loop = self._db[self._collections.results.name], asyncio.get_running_loop()
        is_resumed = after is not None
        if after is None:
            async with await collection.watch(change_tokens.NOTHING) as now:
                after = _token(now.resume_token)
        sent_at: float | None = None
        for is_behind in (True, False) if is_resumed else (False,):
            async with await self._opened(collection, pipeline, after, tenant, is_behind=is_behind) as stream:
                if sent_at is None:
                    yield None, _written(after)
                    sent_at = loop.time()
                while stream.alive:
                    change = await self._next(stream, tenant, is_behind=is_behind)
                    if change is not None:
                        after = _token(change["_id"])
                        doc = change["fullDocument"]
                        with self._results.reads.reading(tenant) as reading:
                            await reading.take(result_documents.response_bytes(doc))
                            result = await self._results.readable(doc)
                        yield result, _written(after)
                        sent_at = loop.time()
                        # A result may have 120 MiB, and the next one may be far away.
                        del doc, result, change
                        await self._pauses.pause()
                        continue
                    newest = _token(stream.resume_token)
                    if loop.time() >= sent_at + _HEARTBEAT_S and newest != after:
                        sent_at = loop.time()
                        yield None, _written(newest)
                    after = newest
                    if is_behind:
                        break
                else:
                    raise Unavailable("MongoDB ended the watch: watch again")

    async def _opened(
        self, collection: Collection, pipeline: list[Document], after: Document, tenant: str, *, is_behind: bool
    ) -> AsyncChangeStream[Document]:
        """Return the stream of results after `after`, which may be far behind, or near the end of the log."""
        if not is_behind:
            return await _opened(collection, pipeline, after, _AWAIT_MS)
        return await self._reads.read(tenant, lambda: _opened(collection, pipeline, after, log_reads.AWAIT_MS))

    async def _next(self, stream: AsyncChangeStream[Document], tenant: str, *, is_behind: bool) -> Document | None:
        """Return the next change; None when there is none yet."""
        return await self._reads.read(tenant, lambda: _next(stream)) if is_behind else await _next(stream)


async def _opened(
    collection: Collection, pipeline: list[Document], after: Document, await_ms: int
) -> AsyncChangeStream[Document]:
    try:
        return await collection.watch(
            pipeline, resume_after=after, max_await_time_ms=await_ms, batch_size=_CHANGES_AT_ONCE
        )
    except OperationFailure as err:
        raise change_tokens.client_error(err) from err


async def _next(stream: AsyncChangeStream[Document]) -> Document | None:
    try:
        return await next_change(stream)
    except OperationFailure as err:
        raise change_tokens.client_error(err) from err


def _pipeline(request: WatchResultsRequest) -> list[Document]:
    match: Document = {
        "operationType": {"$in": ["insert", "replace"]},
        # MongoDB may log a change by retention as a replacement, which is no new result.
        "fullDocument.recorded_at": {"$exists": True},
        "fullDocument.answer_removed_at": {"$exists": False},
    }
    for field in ("model_name", "tenant"):
        if value := check_text(getattr(request, field), field):
            match[f"fullDocument.{field}"] = value
    pipeline: list[Document] = [{"$match": match}]
    if request.omit_response:
        pipeline.append({"$unset": ["fullDocument.response", "fullDocument.blob"]})
    return pipeline


def _written(token: object) -> str:
    return change_tokens.encode(_token(token))


def _token(token: object) -> Document:
    # MongoDB sends one with each empty batch since 4.0.7.
    assert isinstance(token, dict)
    return token
