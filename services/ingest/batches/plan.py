"""Plan of a batch: the chunks that its inputs are cut into, in their order.

The plan is a log. Chunk n has the position at which chunk n + 1 begins, so an instance that continues a plan needs only
its last chunk. When two instances plan concurrently, the database accepts each number once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from services.ingest.batches.batch import Batch, Chunk, Format
from services.ingest.batches.inputs import json_lines, npz_rows
from services.ingest.batches.inputs.listing import ListedEntry, listed
from services.ingest.batches.inputs.locations import Entry, InputLocations
from services.ingest.batches.inputs.parquet_rows import open_parquet, row_bytes
from services.ingest.batches.inputs.piece import Span, even_spans
from services.ingest.batches.mapping import RequestedColumns, check_file
from services.ingest.batches.readers import naming_file, open_pinned
from shoal.errors import InvalidArgument

CHUNK_BYTES = 32 << 20
"""Approximate size at which a chunk ends, so that it takes seconds: a kill discards at most that much work."""
_OBJECTS = 256
# Limit on the rows of one file. A header of a few bytes can claim any number, whose plan would fill MongoDB.
_MAX_ROWS = 1 << 32


def plan(locations: InputLocations, batch: Batch, tail: Chunk | None) -> Iterator[Chunk]:
    """Yield the chunks after `tail` (None: all). Blocks: run it in a thread.

    Raises:
        DataLoss: an input has changed since the batch was submitted. InvalidArgument: an input does not fit the model.
        NotFound: an input was removed. Unavailable: an input cannot be read now.
    """
    assert batch.listing is not None
    number, first = (0, 0) if tail is None else (tail.number + 1, tail.first + tail.span.rows)
    with locations.open(batch.listing) as listing:
        for line, span in _spans(locations, batch, listing, tail):
            entry = batch.listing if batch.format is Format.OBJECTS else line.entry
            yield Chunk(batch.id, number, entry, line.offset, line.end, span, first)
            number, first = number + 1, first + span.rows


def _spans(
    locations: InputLocations, batch: Batch, listing: BinaryIO, tail: Chunk | None
) -> Iterator[tuple[ListedEntry, Span]]:
    if batch.format is Format.OBJECTS:
        assert batch.listing is not None
        after = Span(0, 0) if tail is None else tail.span
        rows = min(batch.chunk_rows, _OBJECTS)
        for span in json_lines.spans(listing, rows, CHUNK_BYTES, row=after.row + after.rows, offset=after.end):
            yield ListedEntry(batch.listing, span.offset, span.end), span
        return
    for line in listed(listing, 0 if tail is None else tail.line):
        after = tail.span if tail is not None and line.offset == tail.line else Span(0, 0)
        with naming_file(line.entry):
            yield from ((line, span) for span in _file_spans(locations, batch, line.entry, after))


def _file_spans(locations: InputLocations, batch: Batch, entry: Entry, after: Span) -> Iterator[Span]:
    """Yield the spans of one file after `after`."""
    with open_pinned(locations, entry) as file:
        if not after.rows:
            check_file(batch.format, file, RequestedColumns.of(batch))
        row = after.row + after.rows
        if batch.format is Format.JSONL:
            yield from json_lines.spans(file, batch.chunk_rows, CHUNK_BYTES, row=row, offset=after.end)
            return
        rows, each = _measured(batch, file)
        if rows > _MAX_ROWS:
            raise InvalidArgument(f"the file claims {rows} rows: at most {_MAX_ROWS} are accepted")
        yield from even_spans(rows, each, batch.chunk_rows, CHUNK_BYTES, row)


def _measured(batch: Batch, file: BinaryIO) -> tuple[int, float]:
    """Return the number of rows of a file, and the approximate size of a row."""
    file.seek(0)
    if batch.format is Format.PARQUET:
        parquet = open_parquet(file)
        return parquet.metadata.num_rows, row_bytes(parquet)
    columns = {column for _, column in batch.columns}
    found = [member for member in npz_rows.members(file) if member.name in columns]
    return found[0].shape[0], sum(member.row_bytes for member in found)
