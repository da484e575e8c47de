"""The plan of a batch: which chunks its inputs are cut into, in their order.

The plan is a log. Chunk n says where chunk n + 1 begins, so that whoever goes on with a plan needs its last chunk only;
and of two who plan at once, the database takes each number from one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from services.ingest.batches.batch import Batch, Chunk, Format
from services.ingest.batches.inputs import json_lines, npz_rows
from services.ingest.batches.inputs.listing import Listed, listed
from services.ingest.batches.inputs.locations import Entry, InputLocations
from services.ingest.batches.inputs.parquet_rows import open_parquet, row_bytes
from services.ingest.batches.inputs.piece import Span, even_spans
from services.ingest.batches.mapping import RequestedColumns, check_file
from services.ingest.batches.readers import named, opened
from shoal.errors import InvalidArgument

CHUNK_BYTES = 32 << 20
"""A chunk ends when its rows are about this large, so that one is done within seconds: what a kill throws away."""
_OBJECTS = 256
_MOST_ROWS = 1 << 32
# Of one file. A few bytes can say that they are rows without end, and would be planned until MongoDB is full.


def plan(locations: InputLocations, batch: Batch, tail: Chunk | None) -> Iterator[Chunk]:
    """The chunks after `tail` (None: all). It blocks: for a thread.

    Raises:
        DataLoss: an input is not what it was when the batch was submitted. InvalidArgument: it is not fit.
        NotFound: it is gone. Unavailable: it cannot be read now.
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
) -> Iterator[tuple[Listed, Span]]:
    if batch.format is Format.OBJECTS:
        assert batch.listing is not None
        after = Span(0, 0) if tail is None else tail.span
        rows = min(batch.chunk_rows, _OBJECTS)
        for span in json_lines.spans(listing, rows, CHUNK_BYTES, row=after.row + after.rows, offset=after.end):
            yield Listed(batch.listing, span.offset, span.end), span
        return
    for line in listed(listing, 0 if tail is None else tail.line):
        after = tail.span if tail is not None and line.offset == tail.line else Span(0, 0)
        with named(line.entry):
            yield from ((line, span) for span in _file_spans(locations, batch, line.entry, after))


def _file_spans(locations: InputLocations, batch: Batch, entry: Entry, after: Span) -> Iterator[Span]:
    """The spans of one file after `after`."""
    with opened(locations, entry) as file:
        if not after.rows:
            check_file(batch.format, file, RequestedColumns.of(batch))
        row = after.row + after.rows
        if batch.format is Format.JSONL:
            yield from json_lines.spans(file, batch.chunk_rows, CHUNK_BYTES, row=row, offset=after.end)
            return
        rows, each = _measured(batch, file)
        if rows > _MOST_ROWS:
            raise InvalidArgument(f"it says that it has {rows} rows: at most {_MOST_ROWS} are taken of one file")
        yield from even_spans(rows, each, batch.chunk_rows, CHUNK_BYTES, row)


def _measured(batch: Batch, file: BinaryIO) -> tuple[int, float]:
    """How many rows a file has, and how large one is."""
    file.seek(0)
    if batch.format is Format.PARQUET:
        parquet = open_parquet(file)
        return parquet.metadata.num_rows, row_bytes(parquet)
    columns = {column for _, column in batch.columns}
    found = [member for member in npz_rows.members(file) if member.name in columns]
    return found[0].shape[0], sum(member.row_bytes for member in found)
