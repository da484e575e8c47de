"""ExportResults: results that match a filter as Parquet files, oldest first, in parts.

    stream ──rows──> part (in memory) ──full──> part-00000.parquet, part-00001.parquet, ... ──all──> _manifest.json
                                          └─ cursor: resume after this part

A part is named by its number and written whole or not at all; the cursor after a part holds its end. So an interrupted
export resumes after its last part, and rewrites the unfinished part under the same name. The manifest is written last:
with it, the export is complete. A running export claims its location (claim.py). Its first file, `_export-ID`, names
the export: a cursor resumes only where that file is, so a made-up cursor replaces no file of another export.

An export is written to a location that the operator allows (locations.py), or returned to a caller who gave no URL.
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
from mesh.rpc.places import Places
from services.store.documents import Collections
from services.store.exports.claim import Claim
from services.store.exports.locations import ExportLocation, ExportLocations, name_of
from services.store.page_token import Cursor, decode_cursor, encode_cursor, filter_digest
from services.store.results import result_rules
from services.store.results.result_stream import ResultStream
from services.store.results.results import Results
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.store.v1.store_pb2 import ExportResultsRequest

if TYPE_CHECKING:
    from services.store.exports.part import ExportPart

MANIFEST = "_manifest.json"
"""Name of the manifest. Readers of Parquet folders ignore names that begin with `_`."""
DEFAULT_PART_ROWS, MAX_PART_ROWS = 100_000, 1_000_000
_STEP_ROWS = 1_000
_CHUNK_BYTES = 1 << 20
_MAX_PARTS = 99_999
_CURSOR = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})\.([0-9]{1,18})\.([0-9]{1,18})\.([0-9a-f]{32}|)\.([^.]*)")


@dataclass(frozen=True)
class ExportStatus:
    """Status of an export: `parts` are written, with `rows` and `size` bytes. Of `answers_lost` rows the answer is
    damaged and left out.
    """

    cursor: Cursor
    export: str
    """The export's id; empty when the files are returned to the caller."""
    parts: int = 0
    rows: int = 0
    size: int = 0
    answers_lost: int = 0

    @property
    def is_complete(self) -> bool:
        return self.cursor.after >= self.cursor.last


@dataclass(frozen=True)
class ExportProgress:
    """Content of one response message: the progress, and a piece of a file that is returned to the caller."""

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
class ClaimedLocation:
    """Location that this export has claimed."""

    _location: ExportLocation
    _claim: Claim

    async def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all. Raises Aborted when another export may have claimed the location."""
        self._claim.check()
        await self._location.put(name, data)


class Exports:
    """Runs a bounded number of exports at a time, because each holds a part in memory."""

    def __init__(
        self,
        collections: Collections,
        results: Results,
        stream: ResultStream,
        locations: ExportLocations,
        threads: Threads,
        most: int,
    ) -> None:
        self._collections = collections
        self._results = results
        self._stream = stream
        self._locations = locations
        self._threads = threads
        self._places = Places(most, "exports", retry_after_ms=5_000)

    async def run(
        self, request: ExportResultsRequest, tenant: str | None = None
    ) -> AsyncGenerator[ExportProgress, None]:
        """Run an export and yield its progress. Closing the generator ends the export after its last part.

        `tenant`: that of a verified caller, who may use the locations of its tenant only.

        Raises:
            InvalidArgument: a bad filter, URL, cursor or number of rows.
            PermissionDenied: the operator has not allowed the location, or the object store refuses.
            FailedPrecondition: the location holds an export, or another one is running there; pyarrow is missing.
            Aborted: the export stalled for so long that another one may write there now.
            ResourceExhausted: too many exports; the disk is full.
            Unavailable: MongoDB or the object store is unavailable: resume with the last cursor.
        """
        result_rules.check_filter(request.filter)
        check_part_rows(request.part_rows)
        with self._places.take(request.filter.tenant):
            async with aclosing(self._run(request, tenant)) as running:
                async for progress in running:
                    yield progress

    async def _run(self, request: ExportResultsRequest, tenant: str | None) -> AsyncGenerator[ExportProgress, None]:
        digest = _digest(request)
        status = decode(request.cursor, digest) if request.cursor else None
        if status is not None and bool(status.export) != bool(request.url):
            raise _invalid_cursor()
        export = status.export if status is not None else uuid.uuid4().hex if request.url else ""
        location = None
        async with AsyncExitStack() as stack:
            if request.url:
                opened = await self._locations.open(request.url, tenant)
                claim = Claim(self._collections, name_of(request.url, opened), export)
                location = ClaimedLocation(opened, await stack.enter_async_context(claim))
                if status is None:
                    await _check_empty(opened, request.url)
                    await location.put(_marker(export), b"shoal results 1\n")
                elif await opened.size(_marker(export)) is None:
                    raise FailedPrecondition(
                        f"cursor: it belongs to no export at {request.url}: leave it out to export everything to "
                        "another location"
                    )
            if status is None:
                status = ExportStatus(await self._stream.whole(request.filter), export)
            async with aclosing(self._write(request, digest, status, location)) as written:
                async for progress in written:
                    yield progress

    async def _write(
        self, request: ExportResultsRequest, digest: str, status: ExportStatus, location: ClaimedLocation | None
    ) -> AsyncGenerator[ExportProgress, None]:
        yield _progress(status, digest)
        while not status.is_complete:
            part = _new_part(request.part_rows or DEFAULT_PART_ROWS)
            cursor = status.cursor
            while cursor.after < cursor.last and not part.is_full:
                cursor = await self._fill(part, request, cursor)
                lost = status.answers_lost + part.answers_lost
                yield replace(_progress(status, digest), rows=status.rows + part.rows, answers_lost=lost)
            data = await self._threads.run(part.finish)
            name = f"part-{status.parts:05}.parquet"
            status = replace(
                status,
                cursor=cursor,
                parts=status.parts + 1,
                rows=status.rows + part.rows,
                size=status.size + len(data),
                answers_lost=status.answers_lost + part.answers_lost,
            )
            async for progress in self._deliver(location, name, data, _progress(status, digest)):
                yield progress
        manifest = json.dumps(_manifest(request, status), indent=2).encode()
        async for progress in self._deliver(location, MANIFEST, manifest, _progress(status, digest)):
            yield progress
        yield replace(_progress(status, digest), complete=True)

    async def _fill(self, part: ExportPart, request: ExportResultsRequest, cursor: Cursor) -> Cursor:
        """Add the next rows to `part`. Return the cursor after them."""
        size = min(_STEP_ROWS, part.free_rows)
        with self._results.reads.reading(request.filter.tenant) as reading:
            docs, cursor = await self._stream.step(
                request.filter, cursor, reading, size=size, omit_response=request.omit_response
            )
            await self._threads.run(part.add, await self._results.all_readable(docs))
        return cursor

    async def _deliver(
        self, location: ClaimedLocation | None, name: str, data: bytes, progress: ExportProgress
    ) -> AsyncGenerator[ExportProgress, None]:
        """Write a file to the location and yield `progress`; without a location, yield the file in pieces."""
        if location is not None:
            await location.put(name, data)
            yield progress
            return
        for at in range(0, len(data), _CHUNK_BYTES):
            chunk = data[at : at + _CHUNK_BYTES]
            yield replace(progress, file=name, file_bytes=len(data), offset=at, chunk=chunk)


def check_part_rows(rows: int) -> None:
    """Raise InvalidArgument when a part may not have that many rows."""
    if not 0 <= rows <= MAX_PART_ROWS:
        raise InvalidArgument(f"part_rows: expected 1 to {MAX_PART_ROWS}, or 0 for {DEFAULT_PART_ROWS}; got {rows}")


def encode(status: ExportStatus, digest: str) -> str:
    """Return the cursor of an export with that status."""
    numbers = f"{status.parts}.{status.rows}.{status.size}.{status.answers_lost}"
    return f"{numbers}.{status.export}.{encode_cursor(status.cursor, digest)}"


def decode(cursor: str, digest: str) -> ExportStatus:
    """Return the status of the export of `cursor`.

    Raises:
        InvalidArgument: the cursor is malformed, or belongs to another filter or location.
    """
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise _invalid_cursor()
    *numbers, export, token = match.groups()
    parts, rows, size, lost = map(int, numbers)
    if parts > _MAX_PARTS:
        raise InvalidArgument(f"cursor: an export has {_MAX_PARTS} parts at most")
    return ExportStatus(decode_cursor(token, digest), export, parts, rows, size, lost)


def _invalid_cursor() -> InvalidArgument:
    return InvalidArgument("cursor: not one of an export of this service: leave it out to export everything")


def _digest(request: ExportResultsRequest) -> str:
    """Return a short digest of the filter, the options and the location of an export."""
    parts = [filter_digest(request.filter), request.url, str(request.omit_response), str(request.part_rows)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _progress(status: ExportStatus, digest: str) -> ExportProgress:
    return ExportProgress(status.rows, status.size, status.parts, encode(status, digest), status.answers_lost)


def _manifest(request: ExportResultsRequest, status: ExportStatus) -> dict[str, object]:
    return {
        "format": "shoal results 1",
        "rows": status.rows,
        "bytes": status.size,
        "parts": status.parts,
        "filter": MessageToDict(request.filter, preserving_proto_field_name=True),
        "answers": not request.omit_response,
        "answers_lost": status.answers_lost,
    }


def _new_part(rows: int) -> ExportPart:
    try:
        from services.store.exports.part import ExportPart
    except ImportError as err:
        raise FailedPrecondition("exports need pyarrow where the store runs: pip install 'shoal[parquet]'") from err
    return ExportPart(rows)


def _marker(export: str) -> str:
    """Return the name of the file that says which export a location holds."""
    return f"_export-{export}"


async def _check_empty(location: ExportLocation, url: str) -> None:
    """Check that the location holds no part of an export: readers would take two exports for one."""
    for name in (MANIFEST, "part-00000.parquet"):
        if await location.size(name) is not None:
            raise FailedPrecondition(
                f"url: {url} holds an export already, or a part of one ({name}): choose another location, or resume "
                "that export with its cursor"
            )
