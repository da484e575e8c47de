"""Files of a batch, opened as they were pinned, and read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from services.ingest.batches.batch import Batch, Chunk, Format
from services.ingest.batches.inputs.json_lines import JsonLines
from services.ingest.batches.inputs.npz_rows import NpzRows
from services.ingest.batches.inputs.object_rows import ObjectRows
from services.ingest.batches.inputs.parquet_rows import ParquetRows
from services.ingest.batches.inputs.piece import ROW_BYTES, Rows
from services.ingest.batches.inputs.places import Entry, Places
from shoal.errors import DataLoss, ShoalError

_KEPT = 4
# Readers that are kept open: one for each chunk that runs, and some for batches that take turns.


@contextmanager
def opened(places: Places, entry: Entry) -> Iterator[BinaryIO]:
    """A file, as it was pinned.

    Raises:
        DataLoss: it has changed since. NotFound: it is gone. PermissionDenied, Unavailable.
    """
    with open_pinned(places, entry) as file:
        yield file


def open_pinned(places: Places, entry: Entry) -> BinaryIO:
    """The same; the caller closes it."""
    now = places.stat(entry.url)
    if now != entry:
        raise DataLoss(
            f"{entry.url} has changed since the batch was submitted ({entry.size} bytes then, {now.size} now): "
            "submit it again as it is now"
        )
    return places.open(entry)


@contextmanager
def named(entry: Entry) -> Iterator[None]:
    """Errors inside the block say which file they are about."""
    try:
        yield
    except ShoalError as err:
        if entry.url in err.message:
            raise
        raise type(err)(f"{entry.url}: {err.message}", retry_after_ms=err.retry_after_ms) from err


class Readers:
    """Readers that stay open between chunks that follow each other. For threads, one chunk of a reader at a time."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._kept: dict[tuple[str, str, str], list[Rows]] = {}

    @contextmanager
    def at(self, batch: Batch, chunk: Chunk) -> Iterator[Rows]:
        """A reader at the first row of a chunk. One that fails is not kept."""
        key = (batch.id, chunk.entry.url, chunk.entry.version)
        with named(chunk.entry):
            spare = self._kept.pop(key, [])
            rows = spare.pop() if spare else self._open(batch, chunk)
            if spare:
                self._kept[key] = spare
            try:
                rows.seek(chunk.span.row, chunk.span.offset)
                yield rows
            except BaseException:
                rows.close()
                raise
            self._keep(key, rows)

    def close(self) -> None:
        """Closes all."""
        for readers in self._kept.values():
            for rows in readers:
                rows.close()
        self._kept = {}

    def _keep(self, key: tuple[str, str, str], rows: Rows) -> None:
        self._kept.setdefault(key, []).append(rows)
        while sum(map(len, self._kept.values())) > _KEPT:
            oldest = next(iter(self._kept))
            self._kept[oldest].pop(0).close()
            if not self._kept[oldest]:
                del self._kept[oldest]

    def _open(self, batch: Batch, chunk: Chunk) -> Rows:
        file = open_pinned(self._places, chunk.entry)
        columns = frozenset(column for _, column in batch.columns) | kept_names(batch.kept)
        if batch.format is Format.OBJECTS:
            return ObjectRows(file, lambda entry: self._places.read(entry.url, ROW_BYTES))
        return rows_of(batch.format, file, columns)


def rows_of(kind: Format, file: BinaryIO, columns: frozenset[str]) -> Rows:
    """A reader of a file of rows, which closes it."""
    if kind is Format.PARQUET:
        return ParquetRows(file, columns)
    if kind is Format.NPZ:
        return NpzRows(file, columns)
    return JsonLines(file, columns)


def kept_names(kept: bytes) -> frozenset[str]:
    """The columns that are carried over."""
    import pyarrow as pa

    return frozenset(pa.ipc.read_schema(pa.BufferReader(kept)).names) if kept else frozenset()
