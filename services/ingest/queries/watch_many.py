"""Watching many jobs: every transition of those that match, once, in order, over any number of disconnects.

    MongoDB's log ──change stream of this watcher──> (job as of that transition, token) ──> client
         ^                                                                                    │
         └────────────────────────── watch again, after the last token <──────────────────────┘

A token is a place in MongoDB's log, which outlives this process: whoever serves the next watch goes on exactly there.
Each transition is one write, and so one change (only a job that is claimed as it is made begins with two); the job is
looked up soon after, and its history cut to that.
With `existing`, the jobs that are there are told first, by id; the token then says how far that has come, too, and the
place in the log from where changes follow, so that nothing falls between the two.

Each watcher has a change stream of its own, because each stands at a place of its own; they are bounded, and have
connections of their own, so that they never take those that jobs need.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from pymongo.asynchronous.change_stream import AsyncChangeStream
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import OperationFailure

from mesh import change_tokens
from mesh.mongo import Document, next_change, translated
from services.ingest.documents import WITHOUT_REQUEST, job_of
from services.ingest.job import Job
from services.ingest.queries.filters import JobFilter
from services.ingest.queries.watch import as_of
from services.ingest.ulid import is_ulid
from shoal.errors import InvalidArgument, ResourceExhausted, Unavailable

_AWAIT_MS = 1_000
_HEARTBEAT_S = 10.0
# A watcher with nothing to tell says how far it has come: its token must not grow older than MongoDB's log.
_LISTED_AT_ONCE = 200
_MOST_AT_ONCE = 10
# Transitions of a job as it is made: two at most, today.


@dataclass(frozen=True, slots=True)
class ReportedStates:
    """What a watcher is told: a job, and how to go on after it. Without a job: only how to go on."""

    token: str
    job: Job | None = None
    is_existing: bool = False


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How far a watcher has come."""

    log: Document
    """The change stream's own token."""
    listed: str | None = None
    """Set while the jobs that were there are being told: the last one."""
    told: int = 0
    """Transitions of the next change that were told: a job that is claimed as it is made begins with two."""


class WatchMany:
    """Opens watches, a bounded number at a time. `jobs` is of a client for watches alone."""

    def __init__(self, jobs: AsyncCollection[Document], max_watches: int) -> None:
        self._jobs = jobs
        self._max_watches = max_watches
        self._open = 0

    async def follow(self, filter_: JobFilter, *, existing: bool, token: str) -> AsyncGenerator[ReportedStates, None]:
        """First that the watch stands, then the jobs that are there (when `existing`, and no token says that they were
        told), then each transition. Never ends by itself.

        Raises:
            InvalidArgument: a token that is none of this filter.
            OutOfRange: its place is no longer in MongoDB's log.
            ResourceExhausted: too many watches.
            Unavailable: MongoDB went away: go on with the last token.
        """
        place = _place(token, filter_) if token else None
        if self._open >= self._max_watches:
            raise ResourceExhausted(f"{self._open} watches are open, the most there may be", retry_after_ms=1_000)
        self._open += 1
        try:
            with translated("watching jobs"):
                async for told in self._told(filter_, place, existing):
                    yield told
        finally:
            self._open -= 1

    async def _told(
        self, filter_: JobFilter, place: StreamPosition | None, existing: bool
    ) -> AsyncGenerator[ReportedStates, None]:
        if place is None:
            async with await self._stream(filter_, None) as stream:
                place = StreamPosition(_token_of(stream), "" if existing else None)
        yield ReportedStates(_written(place, filter_))
        if place.listed is not None:
            async for told in self._listed(filter_, place):
                yield told
        async for told in self._changed(filter_, place):
            yield told

    async def _listed(self, filter_: JobFilter, place: StreamPosition) -> AsyncGenerator[ReportedStates, None]:
        after = place.listed or ""
        while True:
            query = {"$and": [filter_.query(), {"_id": {"$gt": after}}]}
            found = await self._jobs.find(query, WITHOUT_REQUEST).sort("_id", 1).limit(_LISTED_AT_ONCE).to_list()
            for document in found:
                after = document["_id"]
                yield ReportedStates(
                    _written(replace(place, listed=after), filter_), job_of(document), is_existing=True
                )
            if len(found) < _LISTED_AT_ONCE:
                return

    async def _changed(self, filter_: JobFilter, place: StreamPosition) -> AsyncGenerator[ReportedStates, None]:
        loop = asyncio.get_running_loop()
        told_at, told, skipped = loop.time(), place.log, place.told
        async with await self._stream(filter_, told) as stream:
            while stream.alive:
                change = await _next(stream)
                if change is not None and (views := _views(change, filter_)):
                    for number, view in enumerate(views[skipped:], skipped + 1):
                        here = (
                            StreamPosition(told, told=number) if number < len(views) else StreamPosition(change["_id"])
                        )
                        yield ReportedStates(_written(here, filter_), view)
                    told_at, told, skipped = loop.time(), change["_id"], 0
                elif change is None and loop.time() >= told_at + _HEARTBEAT_S and _token_of(stream) != told:
                    told_at, told = loop.time(), _token_of(stream)
                    yield ReportedStates(_written(StreamPosition(told, told=skipped), filter_))
        raise Unavailable("the watch was ended by MongoDB: watch again")

    async def _stream(self, filter_: JobFilter, after: Document | None) -> AsyncChangeStream[Document]:
        try:
            return await self._jobs.watch(
                filter_.pipeline(), full_document="updateLookup", resume_after=after, max_await_time_ms=_AWAIT_MS
            )
        except OperationFailure as err:
            raise change_tokens.explained(err) from err


async def _next(stream: AsyncChangeStream[Document]) -> Document | None:
    try:
        return await next_change(stream)
    except OperationFailure as err:
        raise change_tokens.explained(err) from err


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
    assert isinstance(token, dict)  # Since MongoDB 4.0.7 each batch has one, empty or not.
    return token


def _written(place: StreamPosition, filter_: JobFilter) -> str:
    document: Document = {"log": place.log, "of": filter_.digest}
    if place.listed is not None:
        document["listed"] = place.listed
    if place.told:
        document["told"] = place.told
    return change_tokens.written(document)


def _place(token: str, filter_: JobFilter) -> StreamPosition:
    document = change_tokens.read(token)
    log, listed, told = change_tokens.checked(document.get("log")), document.get("listed"), document.get("told", 0)
    is_listed = listed is None or listed == "" or (isinstance(listed, str) and is_ulid(listed))
    if not is_listed or type(told) is not int or not 0 <= told <= _MOST_AT_ONCE:
        raise InvalidArgument("resume_token: not a token of this service: leave it out to watch from now on")
    if document.get("of") != filter_.digest:
        raise InvalidArgument("resume_token: it belongs to another filter: go on with the filter it came from")
    return StreamPosition(log, listed, told)
