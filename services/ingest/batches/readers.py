"""Readers of a batch's files, which check that each file is still the pinned version."""

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
# Readers that stay open: one for each running chunk, and some for batches that alternate.
_KEPT = 4


def open_pinned(locations: InputLocations, entry: Entry) -> BinaryIO:
    """Open a pinned file. The caller closes it.

    Raises:
        DataLoss: the file has changed. NotFound: it was removed. PermissionDenied, Unavailable.
    """
    check_pinned(locations, entry)
    return locations.open(entry)


def check_pinned(locations: InputLocations, entry: Entry) -> None:
    """Check that a file is still the pinned version. Raises as `open_pinned` does."""
    _check_same(entry, locations.stat(entry.url))


def _check_same(entry: Entry, now: Entry) -> None:
    if now != entry:
        raise DataLoss(
            f"{entry.url} has changed since the batch was submitted ({entry.size} bytes then, {now.size} now): "
            "submit it again as it is now"
        )


def read_pinned(locations: InputLocations, entry: Entry) -> bytes:
    """Return the content of a small pinned file. Raises as `open_pinned` does."""
    now, data = locations.fetch(entry.url)
    _check_same(entry, now)
    return data


@contextmanager
def naming_file(entry: Entry) -> Iterator[None]:
    """Add the file's URL to errors that are raised inside the block."""
    try:
        yield
    except ShoalError as err:
        if entry.url in err.message:
            raise
        raise type(err)(f"{entry.url}: {err.message}", retry_after_ms=err.retry_after_ms) from err


class ReaderCache:
    """Cache of readers that stay open between consecutive chunks. Its methods block; they are safe in any thread."""

    def __init__(self, locations: InputLocations) -> None:
        self._locations = locations
        self._lock = threading.Lock()
        self._kept: list[tuple[_Key, Rows]] = []

    def acquire(self, batch: Batch, chunk: Chunk) -> Rows:
        """Return a reader at the first row of a chunk. The caller releases or closes it.

        Raises:
            DataLoss: the file has changed, or is broken. NotFound: it was removed. PermissionDenied, Unavailable.
        """
        with naming_file(chunk.entry):
            rows = self._cached(_key(batch, chunk)) or self._open(batch, chunk)
            try:
                # A cached reader may see later changes of its file.
                check_pinned(self._locations, chunk.entry)
                rows.seek(chunk.span.row, chunk.span.offset)
            except BaseException:
                rows.close()
                raise
            return rows

    def release(self, batch: Batch, chunk: Chunk, rows: Rows) -> None:
        """Return a reader to the cache. Raises as `acquire` does when the file changed: the rows read are invalid."""
        with naming_file(chunk.entry):
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
        """Close all cached readers."""
        with self._lock:
            kept, self._kept = self._kept, []
        for _, rows in kept:
            rows.close()

    def _cached(self, key: _Key) -> Rows | None:
        with self._lock:
            for index, (known, rows) in enumerate(self._kept):
                if known == key:
                    del self._kept[index]
                    return rows
        return None

    def _open(self, batch: Batch, chunk: Chunk) -> Rows:
        file = open_pinned(self._locations, chunk.entry)
        if batch.format is Format.OBJECTS:
            return ObjectRows(file, lambda entry: read_pinned(self._locations, entry))
        return rows_of(batch.format, file, RequestedColumns.of(batch).columns)


def _key(batch: Batch, chunk: Chunk) -> _Key:
    return batch.id, chunk.entry.url, chunk.entry.version


def rows_of(kind: Format, file: BinaryIO, columns: frozenset[str]) -> Rows:
    """Return a reader of a file of rows; the reader closes the file. Without a reader, the file is closed here."""
    try:
        if kind is Format.PARQUET:
            return ParquetRows(file, columns)
        if kind is Format.NPZ:
            return NpzRows(file, columns)
        return JsonLines(file, columns)
    except BaseException:
        file.close()
        raise
