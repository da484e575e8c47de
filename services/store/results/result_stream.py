"""StreamResults: all results that match a filter, oldest first, from any position.

    open: position of the newest match ──┐
                                         v
    page ──> message + cursor ──> page ──> ... ──> the page that reaches it: complete

The end is fixed when the stream is first opened: it is the newest matching result then, and the cursor carries it. So a
stream ends however fast results are recorded, and its promise needs no clock: every result that was durable at the
opening is at or before that position. Each page is a query of its own: a reader may be slow, and a stream resumes after
any interruption.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from mesh.mongo import Document
from mesh.rpc.places import Places
from services.store.page_token import START, Cursor, decode_cursor, encode_cursor, filter_digest
from services.store.results import result_rules
from services.store.results.read_gate import Reading
from services.store.results.result_watch import ResultWatch
from services.store.results.results import Results, position_of
from shoal.errors import InvalidArgument
from shoal.store.v1.store_pb2 import Result, ResultFilter, StreamResultsRequest

MESSAGE_RESULTS, MESSAGE_BYTES = 200, 4 << 20
"""Limits of a message, large enough that a message costs little beside its results."""


@dataclass(frozen=True)
class StreamPage:
    """Content of one message."""

    results: Sequence[Result]
    cursor: str
    watch_token: str = ""
    complete: bool = False


class ResultStream:
    """Opens a bounded number of streams at a time: each holds a message (at least one response) until its reader has
    read it.
    """

    def __init__(self, results: Results, watch: ResultWatch, max_streams: int) -> None:
        self._results = results
        self._watch = watch
        self._places = Places(max_streams, "streams")

    async def follow(self, request: StreamResultsRequest) -> AsyncGenerator[StreamPage, None]:
        """Yield the pages of a stream; the first is empty.

        Raises:
            InvalidArgument: a bad filter or cursor.
            ResourceExhausted: too many streams.
            Unavailable: MongoDB or the blobs became unavailable: resume with the last cursor.
        """
        result_rules.check_filter(request.filter)
        if request.cursor and request.want_watch_token:
            raise InvalidArgument("want_watch_token: only at the beginning of a stream: leave it or the cursor out")
        with self._places.take(request.filter.tenant):
            async for page in self._pages(request, filter_digest(request.filter)):
                yield page

    async def _pages(self, request: StreamResultsRequest, digest: str) -> AsyncGenerator[StreamPage, None]:
        # The watch first: a result recorded between the two is in the watch, and perhaps also in the stream.
        token = await self._watch.token() if request.want_watch_token else ""
        cursor = decode_cursor(request.cursor, digest) if request.cursor else await self.whole(request.filter)
        yield StreamPage([], encode_cursor(cursor, digest), token, complete=cursor.after >= cursor.last)
        while cursor.after < cursor.last:
            with self._results.reads.reading(request.filter.tenant) as reading:
                docs, cursor = await self.step(request.filter, cursor, reading, omit_response=request.omit_response)
                results = await self._results.all_readable(docs)
            yield StreamPage(results, encode_cursor(cursor, digest), complete=cursor.after >= cursor.last)

    async def whole(self, result_filter: ResultFilter) -> Cursor:
        """Return the cursor of a stream that begins now."""
        with self._results.reads.reading(result_filter.tenant) as reading:
            newest, end = await self._results.page(result_filter, None, 1, reading, omit_response=True)
        # Without a match down to the page's end, the stream has none after it either.
        return Cursor(START, position_of(newest[0]) if newest else end or START)

    async def step(
        self,
        result_filter: ResultFilter,
        cursor: Cursor,
        reading: Reading,
        *,
        size: int = MESSAGE_RESULTS,
        omit_response: bool = False,
    ) -> tuple[list[Document], Cursor]:
        """Return the next documents, read as part of `reading`, and the cursor after them. There may be none.

        The stream ends when `after` has reached `last`.
        """
        page, end = await self._results.page(
            result_filter,
            cursor.after,
            size,
            reading,
            most_bytes=MESSAGE_BYTES,
            oldest_first=True,
            omit_response=omit_response,
        )
        docs = [doc for doc in page if position_of(doc) <= cursor.last]
        if end is None or end > cursor.last or len(docs) < len(page):
            end = cursor.last
        return docs, Cursor(end, cursor.last)
