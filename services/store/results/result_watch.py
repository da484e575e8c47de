"""Results as they are recorded: a change stream for each watcher, for each stands at a place of its own."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator

import bson
from bson import Binary
from bson.errors import BSONError
from pymongo.asynchronous.change_stream import AsyncCollectionChangeStream
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from mesh.mongo import Document, next_change, translated
from services.store.documents import Collection, Collections
from services.store.results.result_rules import check_text
from services.store.results.results import Results
from shoal.errors import InvalidArgument, OutOfRange, ResourceExhausted, Unavailable
from shoal.store.v1.store_pb2 import Result, WatchResultsRequest

_AWAIT_MS = 1_000
_MAX_TOKEN_CHARACTERS = 8_192
# https://github.com/mongodb/mongo/blob/v6.0/src/mongo/base/error_codes.yml
_HISTORY_LOST = frozenset({286, 136})  # ChangeStreamHistoryLost, CappedPositionLost.
_FATAL = 280  # ChangeStreamFatalError: the token's place is not in the stream (any more).
_BAD_TOKEN = frozenset({2, 9, 14, 260, 50811, 40649, 40647, 8704900})


class ResultWatch:
    """Opens watches on results, a bounded number at a time: each holds a connection to MongoDB most of the time.

    `db` is of a client for watches alone, so that they never take the connections that other calls need.
    """

    def __init__(
        self, db: AsyncDatabase[Document], collections: Collections, results: Results, max_watches: int
    ) -> None:
        self._db = db
        self._collections = collections
        self._results = results
        self._max_watches = max_watches
        self._open = 0

    async def follow(self, request: WatchResultsRequest) -> AsyncGenerator[tuple[Result | None, str], None]:
        """Yields (None, token) when the watch stands, then each result with the token to go on after it. Never ends.

        Raises:
            InvalidArgument: a bad filter or token.
            OutOfRange: the token's place is no longer in MongoDB's log.
            ResourceExhausted: too many watches.
            Unavailable: MongoDB went away: go on with the last token.
        """
        pipeline = _pipeline(request)
        after = _decoded(request.resume_token) if request.resume_token else None
        if self._open >= self._max_watches:
            raise ResourceExhausted(f"{self._open} watches are open, the most there may be", retry_after_ms=1_000)
        self._open += 1
        try:
            with translated("watching results"):
                async for item in self._items(pipeline, after):
                    yield item
        finally:
            self._open -= 1

    async def token(self) -> str:
        """Where a watch goes on that shows all that is recorded from now on.

        Raises:
            Unavailable: MongoDB is away.
        """
        with translated("opening a watch of results"):
            async with await _opened(self._db[self._collections.results.name], [], None) as stream:
                return _encoded(stream.resume_token)

    async def _items(
        self, pipeline: list[Document], after: Document | None
    ) -> AsyncGenerator[tuple[Result | None, str], None]:
        collection = self._db[self._collections.results.name]
        stream = await _opened(collection, pipeline, after)
        async with stream:
            yield None, _encoded(after or stream.resume_token)
            while stream.alive:
                if (change := await _next(stream)) is not None:
                    yield await self._results.whole(change["fullDocument"]), _encoded(change["_id"])
        raise Unavailable("the watch was ended by MongoDB: watch again")


async def _opened(
    collection: Collection, pipeline: list[Document], after: Document | None
) -> AsyncCollectionChangeStream[Document]:
    try:
        return await collection.watch(pipeline, resume_after=after, max_await_time_ms=_AWAIT_MS)
    except OperationFailure as err:
        raise _explained(err) from err


async def _next(stream: AsyncCollectionChangeStream[Document]) -> Document | None:
    try:
        return await next_change(stream)
    except OperationFailure as err:
        raise _explained(err) from err


def _explained(err: OperationFailure) -> Exception:
    if err.code in _HISTORY_LOST or err.code == _FATAL:
        return OutOfRange("resume_token: its place is no longer in MongoDB's log: query what was missed, watch anew")
    if err.code in _BAD_TOKEN:
        return InvalidArgument("resume_token: not a token of this watch: leave it out to watch from now on")
    return err


def _pipeline(request: WatchResultsRequest) -> list[Document]:
    match: Document = {"operationType": {"$in": ["insert", "replace"]}}
    for field in ("model_name", "tenant"):
        if value := check_text(getattr(request, field), field):
            match[f"fullDocument.{field}"] = value
    pipeline: list[Document] = [{"$match": match}]
    if request.omit_response:
        pipeline.append({"$unset": ["fullDocument.response", "fullDocument.blob"]})
    return pipeline


def _encoded(token: object) -> str:
    assert isinstance(token, dict)  # Since MongoDB 4.0.7 each batch has one, empty or not.
    return base64.urlsafe_b64encode(bson.encode(token)).decode()


def _decoded(token: str) -> Document:
    try:
        if len(token) > _MAX_TOKEN_CHARACTERS:
            raise ValueError("too long")
        found = bson.decode(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        if not isinstance(found.get("_data"), str) or not found.keys() <= {"_data", "_typeBits"}:
            raise ValueError("unknown form")
        if not isinstance(found.get("_typeBits", b""), bytes | Binary):
            raise ValueError("unknown form")
    except (ValueError, BSONError, binascii.Error) as err:
        raise InvalidArgument("resume_token: not a token of this service: leave it out to watch from now on") from err
    return dict(found)
