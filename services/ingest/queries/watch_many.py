"""Watches of many jobs: every transition of matching jobs, once, in order, over any number of disconnects.

    MongoDB's log ──change stream of this watcher──> (job as of that transition, token) ──> client
         ^                                                                                    │
         └────────────────────────── watch again, after the last token <──────────────────────┘

A token is a position in MongoDB's log, which outlives this process: any instance continues a watch exactly there.
Each transition is one write and one change, except that a job inserted as claimed begins with two. The job is read soon
after the change, and its history is cut to that transition.
With `existing`, the existing jobs come first, by id. The token then also holds the last listed job, and the position in
the log from which changes follow, so that no change is lost in between.

Each watcher has its own change stream, because each has its own position. Their number is bounded, and they use a
separate connection pool, so that jobs never lack connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from functools import partial

from pymongo.asynchronous.change_stream import AsyncChangeStream
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import OperationFailure

from mesh import change_tokens, log_reads
from mesh.log_reads import LogReads
from mesh.mongo import Document, decoded, next_change, translated
from mesh.process.pauses import Pauses
from mesh.rpc.places import Places
from services.ingest.documents import WITHOUT_REQUEST, job_of
from services.ingest.job import Job
from services.ingest.job_scan import ScanPage, scan
from services.ingest.queries.filters import JobFilter
from services.ingest.queries.jobs import weight_of
from services.ingest.queries.watch import as_of
from services.ingest.ulid import is_ulid
from shoal.errors import InvalidArgument, Unavailable

_AWAIT_MS = 1_000
# An idle watch sends a token this often: a token older than MongoDB's log is useless.
_HEARTBEAT_S = 10.0
_LISTED_AT_ONCE = 200
# Changes of one answer of MongoDB, which holds the job of each: with large jobs, answers of 16 MB for each of 100
# watches took gigabytes here and of MongoDB. While changes come one by one, so do the answers.
_CHANGES_AT_ONCE = 8
# Bytes of jobs after which a watch lets the others go on.
_PAUSED_AFTER = 16 << 10
# Maximum transitions of a new job; two at most, today.
_MOST_AT_ONCE = 10


@dataclass(frozen=True, slots=True)
class WatchUpdate:
    """Message of a watch: a job, and the token that continues after it; without a job, only the token."""

    token: str
    job: Job | None = None
    is_existing: bool = False


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Position of a watcher."""

    log: Document
    """The change stream's own token."""
    listed: str | None = None
    """Id of the last listed existing job; None when the listing is complete."""
    reported: int = 0
    """Number of already reported transitions of the next change: a job inserted as claimed begins with two."""


class WatchMany:
    """Server of a bounded number of concurrent watches. `jobs` belongs to a MongoDB client for watches only."""

    def __init__(self, jobs: AsyncCollection[Document], max_watches: int) -> None:
        self._jobs = jobs
        self._places = Places(max_watches, "watches")
        self._pauses = Pauses()
        self._reads = LogReads()

    async def follow(self, filter_: JobFilter, *, existing: bool, token: str) -> AsyncGenerator[WatchUpdate, None]:
        """Yield a first token, then the existing jobs (with `existing`, unless `token` is past them), then transitions.

        The watch never ends by itself.

        Raises:
            InvalidArgument: `token` does not belong to this filter, or no index finds the existing jobs.
            OutOfRange: the token's position is no longer in MongoDB's log.
            ResourceExhausted: too many watches.
            Unavailable: MongoDB is unavailable: continue with the last token.
        """
        position = _read_token(token, filter_) if token else None
        if existing if position is None else position.listed is not None:
            _check_listed(filter_)
        with self._places.take(filter_.tenant), translated("watching jobs"):
            passed = 0
            async for update in self._updates(filter_, position, existing):
                passed += 0 if update.job is None else weight_of(update.job)
                yield update
                del update
                if passed >= _PAUSED_AFTER:
                    passed = 0
                    await self._pauses.pause()

    async def _updates(
        self, filter_: JobFilter, position: StreamPosition | None, existing: bool
    ) -> AsyncGenerator[WatchUpdate, None]:
        if position is None:
            async with await self._stream(change_tokens.NOTHING, None) as stream:
                position = StreamPosition(_token_of(stream), "" if existing else None)
        yield WatchUpdate(_token(position, filter_))
        if position.listed is not None:
            async for update in self._listed(filter_, position):
                yield update
        async for update in self._changed(filter_, position):
            yield update

    async def _listed(self, filter_: JobFilter, position: StreamPosition) -> AsyncGenerator[WatchUpdate, None]:
        after = position.listed or ""
        while True:
            page = await self._reads.read(filter_.tenant, partial(self._existing, filter_, after))
            for document in page.documents:
                after = document["_id"]
                yield WatchUpdate(_token(replace(position, listed=after), filter_), job_of(document), is_existing=True)
            if page.end is None:
                return
            # The token saves another walk over jobs that do not match.
            if not page.documents:
                yield WatchUpdate(_token(replace(position, listed=page.end), filter_))
            after = page.end

    async def _existing(self, filter_: JobFilter, after: str) -> ScanPage:
        if not filter_.ids:
            return await scan(self._jobs, filter_.query(), _LISTED_AT_ONCE, after=after, order=1)
        query = {"$and": [filter_.query(), {"_id": {"$gt": after}}]}
        batches = self._jobs.find_raw_batches(query, WITHOUT_REQUEST).sort("_id", 1).limit(_LISTED_AT_ONCE)
        found = [document async for document in decoded(batches, self._jobs)]
        return ScanPage(found, found[-1]["_id"] if len(found) == _LISTED_AT_ONCE else None)

    async def _changed(self, filter_: JobFilter, position: StreamPosition) -> AsyncGenerator[WatchUpdate, None]:
        loop = asyncio.get_running_loop()
        sent_at, log, skipped = loop.time(), position.log, position.reported
        newest = log
        for is_behind in (True, False):
            async with await self._opened(filter_, newest, is_behind=is_behind) as stream:
                while stream.alive:
                    change = await self._next(filter_.tenant, stream, is_behind=is_behind)
                    newest = _token_of(stream) if change is None else change["_id"]
                    if change is not None and (views := _views(change, filter_)):
                        for number, view in enumerate(views[skipped:], skipped + 1):
                            is_last = number == len(views)
                            after = StreamPosition(newest) if is_last else StreamPosition(log, reported=number)
                            yield WatchUpdate(_token(after, filter_), view)
                        sent_at, log, skipped = loop.time(), newest, 0
                    elif change is None and loop.time() >= sent_at + _HEARTBEAT_S and newest != log:
                        sent_at, log = loop.time(), newest
                        yield WatchUpdate(_token(StreamPosition(log, reported=skipped), filter_))
                    if change is None and is_behind:
                        break
                else:
                    raise Unavailable("MongoDB ended the watch: watch again with the last token")

    async def _opened(self, filter_: JobFilter, after: Document, *, is_behind: bool) -> AsyncChangeStream[Document]:
        """Return the stream of changes after `after`, which may be far behind, or near the end of the log."""
        if not is_behind:
            return await self._stream(filter_.pipeline(), after)
        return await self._reads.read(
            filter_.tenant, lambda: self._stream(filter_.pipeline(), after, await_ms=log_reads.AWAIT_MS)
        )

    async def _next(self, tenant: str, stream: AsyncChangeStream[Document], *, is_behind: bool) -> Document | None:
        """Return the next change; None when there is none yet."""
        return await self._reads.read(tenant, lambda: _next(stream)) if is_behind else await _next(stream)

    async def _stream(
        self, pipeline: list[Document], after: Document | None, *, await_ms: int = _AWAIT_MS
    ) -> AsyncChangeStream[Document]:
        try:
            return await self._jobs.watch(
                pipeline,
                full_document="updateLookup",
                resume_after=after,
                max_await_time_ms=await_ms,
                batch_size=_CHANGES_AT_ONCE,
            )
        except OperationFailure as err:
            raise change_tokens.client_error(err) from err


def _check_listed(filter_: JobFilter) -> None:
    if filter_.labels and not (filter_.ids or filter_.tenant or filter_.model_name):
        raise InvalidArgument(
            "labels: existing jobs are not found by labels alone: set ids, tenant or model_name too, or leave them out"
        )


async def _next(stream: AsyncChangeStream[Document]) -> Document | None:
    try:
        return await next_change(stream)
    except OperationFailure as err:
        raise change_tokens.client_error(err) from err


def _views(change: Document, filter_: JobFilter) -> list[Job]:
    """Return the job as of each transition in `change` whose new state passes the filter."""
    job = job_of(change["fullDocument"])
    last = len(job.transitions) - 1
    # An insert stands for all transitions of the new job.
    if change["operationType"] == "insert":
        indexes = range(last + 1)
    else:
        # After very many later transitions this one is not kept any more: then the oldest that is kept.
        at = max(0, last - (job.transition_count - change["step"]))
        indexes = range(at, at + 1)
    views = [job if index == last else as_of(job, index) for index in indexes]
    return [view for view in views if filter_.includes(view)]


def _token_of(stream: AsyncChangeStream[Document]) -> Document:
    token = stream.resume_token
    # Since MongoDB 4.0.7 each empty batch has a token. Until pymongo has given the events of another one, it has none.
    assert isinstance(token, dict)
    return token


def _token(position: StreamPosition, filter_: JobFilter) -> str:
    document: Document = {"log": position.log, "of": filter_.digest}
    if position.listed is not None:
        document["listed"] = position.listed
    if position.reported:
        document["told"] = position.reported
    return change_tokens.encode(document)


def _read_token(token: str, filter_: JobFilter) -> StreamPosition:
    document = change_tokens.decode(token)
    log, listed, reported = (
        change_tokens.validated(document.get("log")),
        document.get("listed"),
        document.get("told", 0),
    )
    is_listed = listed is None or listed == "" or (isinstance(listed, str) and is_ulid(listed))
    if not is_listed or type(reported) is not int or not 0 <= reported <= _MOST_AT_ONCE:
        raise InvalidArgument("resume_token: not a token of this service: leave it out to watch from now on")
    if document.get("of") != filter_.digest:
        raise InvalidArgument("resume_token: it belongs to another filter: go on with the filter it came from")
    return StreamPosition(log, listed, reported)
