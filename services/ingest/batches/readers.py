"""Files of a batch, opened as they were pinned, and read row by row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, TypeAlias

from services.ingest.batches.batch import Batch, Chunk, Format
from services.ingest.batches.inputs.json_lines import JsonLines
from services.ingest.batches.inputs.locations import Entry, InputLocations
from services.ingest.batches.inputs.npz_rows import NpzRows
from services.ingest.batches.inputs.object_rows import ObjectRows
from services.ingest.batches.inputs.parquet_rows import ParquetRows
from services.ingest.batches.inputs.piece import Rows
from services.ingest.batches.mapping import RequestedColumns
from shoal.errors import DataLoss, ShoalError

_Key: TypeAlias = tuple[str, str, str]
_KEPT = 4
# Readers that are kept open: one for each chunk that runs, and some for batches that take turns.


def opened(locations: InputLocations, entry: Entry) -> BinaryIO:
    """A file, as it was pinned. The caller closes it.

    Raises:
        DataLoss: it has changed since. NotFound: it is gone. PermissionDenied, Unavailable.
    """
    check_pinned(locations, entry)
    return locations.open(entry)


def check_pinned(locations: InputLocations, entry: Entry) -> None:
    """Whether a file is still what it was when it was pinned. Raises as `opened` does."""
    _check_same(entry, locations.stat(entry.url))


def _check_same(entry: Entry, now: Entry) -> None:
    if now != entry:
        raise DataLoss(
            f"{entry.url} has changed since the batch was submitted ({entry.size} bytes then, {now.size} now): "
            "submit it again as it is now"
        )


def read_pinned(locations: InputLocations, entry: Entry) -> bytes:
    """All of a small file, as it was pinned. Raises as `opened` does."""
    now, data = locations.fetch(entry.url)
    _check_same(entry, now)
    return data


@contextmanager
def named(entry: Entry) -> Iterator[None]:
    """Errors inside the block say which file they are about."""
    try:
        yield
    except ShoalError as err:
        if entry.url in err.message:
            raise
        raise type(err)(f"{entry.url}: {err.message}", retry_after_ms=err.retry_after_ms) from err


class ReaderCache:
    """Readers that stay open between chunks that follow each other. They block: for threads, any number of them."""

    def __init__(self, locations: InputLocations) -> None:
        self._locations = locations
        self._lock = threading.Lock()
        self._kept: list[tuple[_Key, Rows]] = []

    def take(self, batch: Batch, chunk: Chunk) -> Rows:
        """A reader at the first row of a chunk. The caller keeps it for the next chunk, or closes it.

        Raises:
            DataLoss: the file has changed, or is broken. NotFound: it is gone. PermissionDenied, Unavailable.
        """
        with named(chunk.entry):
            rows = self._spare(_key(batch, chunk)) or self._open(batch, chunk)
            try:
                check_pinned(self._locations, chunk.entry)  # One that is kept may see what was written since.
                rows.seek(chunk.span.row, chunk.span.offset)
            except BaseException:
                rows.close()
                raise
            return rows

    def keep(self, batch: Batch, chunk: Chunk, rows: Rows) -> None:
        """Takes back a reader that did not fail. Raises as `take` does: then what it has read does not count."""
        with named(chunk.entry):
            try:
                check_pinned(self._locations, chunk.entry)
            except BaseException:
                rows.close()
                raise
        with self._lock:
            self._kept.append((_key(batch, chunk), rows))
            old = self._kept[:-_KEPT]
            del self._kept[:-_KEPT]
        for _, each in old:
            each.close()

    def close(self) -> None:
        """Closes all."""
        with self._lock:
            kept, self._kept = self._kept, []
        for _, rows in kept:
            rows.close()

    def _spare(self, key: _Key) -> Rows | None:
        with self._lock:
            for index, (known, rows) in enumerate(self._kept):
                if known == key:
                    del self._kept[index]
                    return rows
        return None

    def _open(self, batch: Batch, chunk: Chunk) -> Rows:
        file = opened(self._locations, chunk.entry)
        if batch.format is Format.OBJECTS:
            return ObjectRows(file, lambda entry: read_pinned(self._locations, entry))
        return rows_of(batch.format, file, RequestedColumns.of(batch).columns)


def _key(batch: Batch, chunk: Chunk) -> _Key:
    return batch.id, chunk.entry.url, chunk.entry.version


def rows_of(kind: Format, file: BinaryIO, columns: frozenset[str]) -> Rows:
    """A reader of a file of rows, which closes it."""
    if kind is Format.PARQUET:
        return ParquetRows(file, columns)
    if kind is Format.NPZ:
        return NpzRows(file, columns)
    return JsonLines(file, columns)
