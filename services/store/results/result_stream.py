"""StreamResults: everything that matches, oldest first, from any place on.

    open: the last place of all ──┐
                                  v
    page ──> message + cursor ──> page ──> ... ──> the page that reaches it: complete

The end is fixed when the stream is first opened, as the newest result that matches then, and the cursor carries it. So
a stream ends however fast results come, and what it promises needs no clock: whatever was durable at its opening stands
at or before that place. Each page is a query of its own: a reader may take its time, and a stream goes on after any
break.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from mesh.mongo import Document
from services.store.page_token import START, Cursor, decode_cursor, encode_cursor, filter_digest
from services.store.results import result_rules
from services.store.results.result_watch import ResultWatch
from services.store.results.results import Results, place_of
from shoal.errors import InvalidArgument, ResourceExhausted
from shoal.store.v1.store_pb2 import Result, ResultFilter, StreamResultsRequest

MESSAGE_RESULTS, MESSAGE_BYTES = 200, 4 << 20
"""A message ends before either is exceeded: large enough that a call costs little beside its results."""


@dataclass(frozen=True)
class Piece:
    """What one message carries."""

    results: Sequence[Result]
    cursor: str
    watch_token: str = ""
    complete: bool = False


class ResultStream:
    """Opens streams, a bounded number at a time: each holds up to a message (one response at least) while its reader
    takes its time.
    """

    def __init__(self, results: Results, watch: ResultWatch, max_streams: int) -> None:
        self._results = results
        self._watch = watch
        self._max_streams = max_streams
        self._open = 0

    async def follow(self, request: StreamResultsRequest) -> AsyncGenerator[Piece, None]:
        """Yields the pieces of a stream; the first is empty.

        Raises:
            InvalidArgument: a bad filter or cursor.
            ResourceExhausted: too many streams.
            Unavailable: MongoDB or the blobs went away: go on with the last cursor.
        """
        result_rules.check_filter(request.filter)
        if request.cursor and request.want_watch_token:
            raise InvalidArgument("want_watch_token: only where a stream begins: leave out it or the cursor")
        if self._open >= self._max_streams:
            raise ResourceExhausted(f"{self._open} streams are open, the most there may be", retry_after_ms=1_000)
        self._open += 1
        try:
            async for piece in self._pieces(request, filter_digest(request.filter)):
                yield piece
        finally:
            self._open -= 1

    async def _pieces(self, request: StreamResultsRequest, digest: str) -> AsyncGenerator[Piece, None]:
        # In this order: what is recorded between the two is in the watch, and may be in the stream too.
        token = await self._watch.token() if request.want_watch_token else ""
        cursor = decode_cursor(request.cursor, digest) if request.cursor else await self.whole(request.filter)
        yield Piece([], encode_cursor(cursor, digest), token, complete=cursor.after >= cursor.last)
        while cursor.after < cursor.last:
            docs, cursor = await self.step(request.filter, cursor, omit_response=request.omit_response)
            results = [await self._results.readable(doc) for doc in docs]
            yield Piece(results, encode_cursor(cursor, digest), complete=cursor.after >= cursor.last)

    async def whole(self, wanted: ResultFilter) -> Cursor:
        """The cursor of a stream that begins now."""
        newest, _ = await self._results.page(wanted, None, 1, omit_response=True)
        return Cursor(START, place_of(newest[0]) if newest else START)

    async def step(
        self, wanted: ResultFilter, cursor: Cursor, *, size: int = MESSAGE_RESULTS, omit_response: bool = False
    ) -> tuple[list[Document], Cursor]:
        """The next documents, and the cursor after them. Nothing is left when `after` has reached `last`."""
        page, more = await self._results.page(
            wanted,
            cursor.after,
            size,
            most_bytes=MESSAGE_BYTES,
            oldest_first=True,
            omit_response=omit_response,
        )
        docs = [doc for doc in page if place_of(doc) <= cursor.last]
        is_over = not more or len(docs) < len(page)
        return docs, Cursor(cursor.last if is_over else place_of(docs[-1]), cursor.last)
