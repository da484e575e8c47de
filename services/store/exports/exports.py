"""ExportResults: results that match a filter as Parquet files, oldest first, in parts.

    stream ──rows──> part (in memory) ──full──> part-00000.parquet, part-00001.parquet, ... ──all──> _manifest.json
                                          └─ cursor: go on after this part

A part is named by its number and written whole or not at all, and where it ends is told in the cursor after it. So an
export that breaks off goes on after its last part, and what it writes again lies under the same name. The manifest
comes last: with it, the export is complete. While it is written, its place is taken (claim.py).

What is written goes to a place that the operator allows (places.py), or to the caller, who asked with no URL.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from mesh.process.threads import Threads
from services.store.documents import Collections
from services.store.exports.claim import Claim
from services.store.exports.locations import ExportLocation, ExportLocations, name_of
from services.store.page_token import Cursor, decode_cursor, encode_cursor, filter_digest
from services.store.results import result_rules
from services.store.results.result_stream import ResultStream
from services.store.results.results import Results
from shoal.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from shoal.store.v1.store_pb2 import ExportResultsRequest

if TYPE_CHECKING:
    from services.store.exports.part import ExportPart

MANIFEST = "_manifest.json"
"""Readers of Parquet folders pass over names that begin so."""
DEFAULT_PART_ROWS, MAX_PART_ROWS = 100_000, 1_000_000
_STEP_ROWS = 1_000
_CHUNK_BYTES = 1 << 20
_MAX_PARTS = 99_999
_CURSOR = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})\.([0-9]{1,18})\.([0-9]{1,18})\.([0-9a-f]{32}|)\.([^.]*)")


@dataclass(frozen=True)
class ExportStatus:
    """How far an export has come: `parts` are written, with `rows` in them and `size` bytes. Of so many rows the answer
    is damaged, and left out.
    """

    cursor: Cursor
    export: str
    """Its id; empty when the caller is the place."""
    parts: int = 0
    rows: int = 0
    size: int = 0
    answers_lost: int = 0

    @property
    def is_complete(self) -> bool:
        return self.cursor.after >= self.cursor.last


@dataclass(frozen=True)
class Progress:
    """One message: how far it is, and a piece of a file when the caller is the place."""

    rows: int
    size: int
    parts: int
    cursor: str
    answers_lost: int = 0
    file: str = ""
    file_bytes: int = 0
    offset: int = 0
    chunk: bytes = b""
    complete: bool = False


@dataclass(frozen=True)
class Taken:
    """A place that is ours."""

    _place: ExportLocation
    _claim: Claim

    async def put(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all. Raises Aborted when the place may be another's by now."""
        self._claim.check()
        await self._place.put(name, data)


class Exports:
    """Runs exports, a bounded number at a time: each holds a part."""

    def __init__(
        self,
        collections: Collections,
        results: Results,
        stream: ResultStream,
        places: ExportLocations,
        threads: Threads,
        most: int,
    ) -> None:
        self._collections = collections
        self._results = results
        self._stream = stream
        self._places = places
        self._threads = threads
        self._most = most
        self._running = 0

    async def run(self, request: ExportResultsRequest) -> AsyncGenerator[Progress, None]:
        """Writes an export, and says how far it is. Leaving early ends it after the last part.

        Raises:
            InvalidArgument: a bad filter, URL, cursor or number of rows.
            PermissionDenied: the operator has not allowed the place, or the object store refuses.
            FailedPrecondition: an export lies there already, or is being written; pyarrow is not installed.
            Aborted: it stood still for so long that another may be written there now.
            ResourceExhausted: too many exports; the disk is full.
            Unavailable: MongoDB or the object store is away: go on with the last cursor.
        """
        result_rules.check_filter(request.filter)
        check_part_rows(request.part_rows)
        if self._running >= self._most:
            raise ResourceExhausted(f"{self._running} exports are running, the most there may be", retry_after_ms=5_000)
        self._running += 1
        try:
            async with aclosing(self._run(request)) as running:
                async for progress in running:
                    yield progress
        finally:
            self._running -= 1

    async def _run(self, request: ExportResultsRequest) -> AsyncGenerator[Progress, None]:
        digest = _digest(request)
        at = decode(request.cursor, digest) if request.cursor else None
        if at is not None and bool(at.export) != bool(request.url):
            raise _not_ours()
        export = at.export if at is not None else uuid.uuid4().hex if request.url else ""
        place = None
        async with AsyncExitStack() as stack:
            if request.url:
                opened = await self._places.open(request.url)
                claim = Claim(self._collections, name_of(request.url, opened), export)
                place = Taken(opened, await stack.enter_async_context(claim))
                if at is None:
                    await _check_empty(opened, request.url)
            if at is None:
                at = ExportStatus(await self._stream.whole(request.filter), export)
            async with aclosing(self._written(request, digest, at, place)) as written:
                async for progress in written:
                    yield progress

    async def _written(
        self, request: ExportResultsRequest, digest: str, at: ExportStatus, place: Taken | None
    ) -> AsyncGenerator[Progress, None]:
        yield _progress(at, digest)
        while not at.is_complete:
            part = _new_part(request.part_rows or DEFAULT_PART_ROWS)
            cursor = at.cursor
            while cursor.after < cursor.last and not part.is_full:
                cursor = await self._fill(part, request, cursor)
                lost = at.answers_lost + part.answers_lost
                yield replace(_progress(at, digest), rows=at.rows + part.rows, answers_lost=lost)
            data = await self._threads.run(part.finish)
            name = f"part-{at.parts:05}.parquet"
            at = replace(
                at,
                cursor=cursor,
                parts=at.parts + 1,
                rows=at.rows + part.rows,
                size=at.size + len(data),
                answers_lost=at.answers_lost + part.answers_lost,
            )
            async for progress in self._delivered(place, name, data, _progress(at, digest)):
                yield progress
        manifest = json.dumps(_manifest(request, at), indent=2).encode()
        async for progress in self._delivered(place, MANIFEST, manifest, _progress(at, digest)):
            yield progress
        yield replace(_progress(at, digest), complete=True)

    async def _fill(self, part: ExportPart, request: ExportResultsRequest, cursor: Cursor) -> Cursor:
        """Adds the next rows to `part`; the cursor after them."""
        size = min(_STEP_ROWS, part.room)
        docs, cursor = await self._stream.step(request.filter, cursor, size=size, omit_response=request.omit_response)
        await self._threads.run(part.add, [await self._results.readable(doc) for doc in docs])
        return cursor

    async def _delivered(
        self, place: Taken | None, name: str, data: bytes, told: Progress
    ) -> AsyncGenerator[Progress, None]:
        """Writes a file, and says so. The caller, if it is the place, gets it in pieces."""
        if place is not None:
            await place.put(name, data)
            yield told
            return
        for at in range(0, len(data), _CHUNK_BYTES):
            chunk = data[at : at + _CHUNK_BYTES]
            yield replace(told, file=name, file_bytes=len(data), offset=at, chunk=chunk)


def check_part_rows(rows: int) -> None:
    """How many rows a part may have, or InvalidArgument."""
    if not 0 <= rows <= MAX_PART_ROWS:
        raise InvalidArgument(f"part_rows: expected 1 to {MAX_PART_ROWS}, or 0 for {DEFAULT_PART_ROWS}; got {rows}")


def encode(at: ExportStatus, digest: str) -> str:
    """The cursor of an export that has come so far."""
    return f"{at.parts}.{at.rows}.{at.size}.{at.answers_lost}.{at.export}.{encode_cursor(at.cursor, digest)}"


def decode(cursor: str, digest: str) -> ExportStatus:
    """How far the export of `cursor` had come.

    Raises:
        InvalidArgument: it is none of ours, or one of another filter or place.
    """
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise _not_ours()
    *numbers, export, token = match.groups()
    parts, rows, size, lost = map(int, numbers)
    if parts > _MAX_PARTS:
        raise InvalidArgument(f"cursor: an export has {_MAX_PARTS} parts at most")
    return ExportStatus(decode_cursor(token, digest), export, parts, rows, size, lost)


def _not_ours() -> InvalidArgument:
    return InvalidArgument("cursor: not one of an export of this service: leave it out for all of them")


def _digest(request: ExportResultsRequest) -> str:
    """A short digest of what is asked for, and of where it goes."""
    parts = [filter_digest(request.filter), request.url, str(request.omit_response), str(request.part_rows)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _progress(at: ExportStatus, digest: str) -> Progress:
    return Progress(at.rows, at.size, at.parts, encode(at, digest), at.answers_lost)


def _manifest(request: ExportResultsRequest, at: ExportStatus) -> dict[str, object]:
    return {
        "format": "shoal results 1",
        "rows": at.rows,
        "bytes": at.size,
        "parts": at.parts,
        "filter": MessageToDict(request.filter, preserving_proto_field_name=True),
        "answers": not request.omit_response,
        "answers_lost": at.answers_lost,
    }


def _new_part(rows: int) -> ExportPart:
    try:
        from services.store.exports.part import ExportPart
    except ImportError as err:
        raise FailedPrecondition("exports need pyarrow where the store runs: pip install 'shoal[parquet]'") from err
    return ExportPart(rows)


async def _check_empty(place: ExportLocation, url: str) -> None:
    """That no part of an export lies there: two in one place would be taken for one."""
    for name in (MANIFEST, "part-00000.parquet"):
        if await place.size(name) is not None:
            raise FailedPrecondition(
                f"url: {url} holds an export already, or a part of one ({name}): choose another place, or go on with "
                "the cursor of that one"
            )
