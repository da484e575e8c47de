"""WatchResults: results as they are recorded, with a change stream for each watcher, because positions differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from pymongo.asynchronous.change_stream import AsyncCollectionChangeStream
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from mesh import change_tokens
from mesh.mongo import Document, next_change, translated
from mesh.rpc.places import Places
from services.store.documents import Collection, Collections
from services.store.results import result_documents
from services.store.results.result_rules import check_text
from services.store.results.results import Results
from shoal.errors import Unavailable
from shoal.store.v1.store_pb2 import Result, WatchResultsRequest

_AWAIT_MS = 1_000
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
        if after is None:
            async with await collection.watch(change_tokens.NOTHING) as now:
                after = _token(now.resume_token)
        stream = await _opened(collection, pipeline, after)
        async with stream:
            yield None, _written(after)
            sent_at = loop.time()
            while stream.alive:
                if (change := await _next(stream)) is not None:
                    after = _token(change["_id"])
                    doc = change["fullDocument"]
                    with self._results.reads.reading(tenant) as reading:
                        await reading.take(result_documents.response_bytes(doc))
                        result = await self._results.readable(doc)
                    yield result, _written(after)
                    # A result may have 120 MiB, and the next one may be far away.
                    del doc, result, change
                elif loop.time() < sent_at + _HEARTBEAT_S or (newest := _token(stream.resume_token)) == after:
                    continue
                else:
                    after = newest
                    yield None, _written(after)
                sent_at = loop.time()
        raise Unavailable("MongoDB ended the watch: watch again")


async def _opened(
    collection: Collection, pipeline: list[Document], after: Document | None
) -> AsyncCollectionChangeStream[Document]:
    try:
        return await collection.watch(pipeline, resume_after=after, max_await_time_ms=_AWAIT_MS)
    except OperationFailure as err:
        raise change_tokens.client_error(err) from err


async def _next(stream: AsyncCollectionChangeStream[Document]) -> Document | None:
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
