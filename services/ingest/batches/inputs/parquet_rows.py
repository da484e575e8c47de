"""Reader of Parquet files, page by page, so that a row group may be larger than memory.

A row is reached by reading from the start of its row group; a cached reader continues from its position.
`parquet_pages` and `arrow_sizes` bound what a file may become: rows whose texts may be long are read few at a time, and
texts in lists stay encoded by dictionary until their sizes are known.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services.ingest.batches.inputs.arrow_cells import cells_of
from services.ingest.batches.inputs.arrow_sizes import row_sizes
from services.ingest.batches.inputs.parquet_pages import ColumnPages, GuardedPages, OversizedPages
from services.ingest.batches.inputs.piece import PIECE_BYTES, PIECE_ROWS, ROW_BYTES, Piece, null_column
from shoal.errors import DataLoss, InvalidArgument

_BUFFER_BYTES = 1 << 20
# A batch costs some time itself, most of all where pyarrow makes the dictionary of texts in lists again.
_BATCH_ROWS = 16 << 10
# Texts of one batch, if each row repeats the longest that its dictionary can have.
_REPEATED_BYTES = 64 << 20
_BROKEN = (pa.ArrowException, OSError, ValueError)
FOOTER_BYTES = 8 << 20
"""Metadata of a file, whose C++ objects may take 100 times as much: some 200 bytes for each column of a row group."""
# Elements of a list in the metadata (columns, row groups), and bytes of a text.
_THRIFT_ELEMENTS, _THRIFT_BYTES = 100_000, 4 << 20
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


class ParquetRows:
    """Reader of some columns. Closes `file`.

    Raises (in the constructor and in every method):
        InvalidArgument: the file is no Parquet file. DataLoss: the file is broken, was truncated, or has pages beyond
        the bounds of `parquet_pages`.
    """

    def __init__(self, file: BinaryIO, columns: frozenset[str]) -> None:
        self._guard = GuardedPages(file)
        plain = open_parquet(cast(BinaryIO, self._guard))
        self._types = {field.name: _without_dictionary(field.type) for field in plain.schema_arrow}
        self._columns = [name for name in plain.schema_arrow.names if name in columns]
        self._metadata = plain.metadata
        self._leaves = [
            n
            for n, path in enumerate(_paths(plain.metadata))
            if path.split(".")[0] in self._columns or not self._columns
        ]
        self._file = open_parquet(
            cast(BinaryIO, self._guard),
            metadata=plain.metadata,
            read_dictionary=[plain.metadata.schema.column(n).path for n in self._leaves if self._has_dictionary(n)],
        )
        self._groups = [plain.metadata.row_group(n).num_rows for n in range(plain.metadata.num_row_groups)]
        self._slow_group = -1
        self._row = 0
        self._batches: Iterator[Any] = iter(())
        self._left: Any = None
        self._sizes = np.zeros(0, np.int64)
        self.seek(0, 0)

    def seek(self, row: int, offset: int) -> None:
        """Go to row `row`: from here when the row is ahead in this row group, else from its row group's start."""
        group, start = self._group_of(row)
        if not start <= self._row <= row or self._left is None:
            self._row, self._left = start, None
            self._batches = self._all_batches(group)
        while self._row < row:
            self._take(row - self._row)

    def read(self, limit: int) -> Piece:
        """Return the next rows. A row of more than ROW_BYTES fails alone."""
        first = self._row
        batch, size = self._take(limit)
        if size > ROW_BYTES:
            columns = {name: null_column(1) for name in self._columns}
            nulls = {name: pa.nulls(1, self._types[name]) for name in self._columns}
            return Piece(
                first, 1, columns, {0: f"the row has {size} bytes: at most {ROW_BYTES} are accepted"}, arrow=nulls
            )
        arrays = {name: self._decoded(batch, name) for name in self._columns}
        return Piece(first, batch.num_rows, {name: cells_of(array) for name, array in arrays.items()}, arrow=arrays)

    def _decoded(self, batch: Any, name: str) -> Any:
        column, kind = batch.column(name), self._types[name]
        return column if column.type == kind else column.cast(kind)

    def _all_batches(self, group: int) -> Iterator[Any]:
        """Yield the batches of the row groups from `group` on."""
        for index in range(group, len(self._groups)):
            pages = [self._pages_of(index, leaf) for leaf in self._leaves]
            self._guard.guard(pages)
            is_slow = index == self._slow_group or any(each.has_prefixes for each in pages)
            rows = 1 if is_slow else self._batch_rows(index)
            # Each text may be the longest one of its column's dictionary.
            if longest := sum(self._guard.read_longest_text(each) for each in pages if each.has_texts):
                rows = max(1, min(rows, _REPEATED_BYTES // longest))
            yield from self._joined(
                self._file.iter_batches(rows, row_groups=[index], columns=self._columns or None, use_threads=False)
            )

    def _joined(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, small ones together."""
        parts: list[Any] = []
        rows = size = 0
        is_left = True
        while is_left:
            self._guard.begin_piece()
            try:
                batch = next(batches, None)
            except _BROKEN:
                if parts:
                    yield pa.concat_batches(parts)
                raise
            if is_left := batch is not None:
                parts.append(batch)
                rows, size = rows + batch.num_rows, size + batch.nbytes
            if parts and (rows >= _BATCH_ROWS or size >= PIECE_BYTES or not is_left):
                yield parts[0] if len(parts) == 1 else pa.concat_batches(parts)
                parts, rows, size = [], 0, 0

    def _batch_rows(self, group: int) -> int:
        """Return the rows of one batch: as many as have PIECE_BYTES by what the metadata says."""
        metadata = self._metadata.row_group(group)
        size = 0
        for leaf in self._leaves:
            chunk = metadata.column(leaf)
            values = max(chunk.num_values, metadata.num_rows)
            size += max(chunk.total_uncompressed_size, values * _width_of(self._metadata.schema.column(leaf)))
        return max(1, min(_BATCH_ROWS, int(PIECE_BYTES * metadata.num_rows / max(size, 1))))

    def _has_dictionary(self, leaf: int) -> bool:
        """Return True for texts and bytes in lists, of which one row may repeat a long one often.

        pyarrow keeps all texts of a row group that it reads as dictionaries. It cannot read prefixes so.
        """
        groups = range(self._metadata.num_row_groups)
        schema = self._metadata.schema.column(leaf)
        is_listed = schema.physical_type == "BYTE_ARRAY" and schema.max_repetition_level > 0
        return is_listed and not any(self._pages_of(group, leaf).has_prefixes for group in groups)

    def _pages_of(self, group: int, leaf: int) -> ColumnPages:
        chunk, schema = self._metadata.row_group(group).column(leaf), self._metadata.schema.column(leaf)
        begin = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < begin:
            begin = chunk.dictionary_page_offset
        end = begin + chunk.total_compressed_size
        has_prefixes = "DELTA_BYTE_ARRAY" in chunk.encodings
        is_nested = schema.max_repetition_level > 0
        return ColumnPages(schema.path, begin, end, _width_of(schema), is_nested, has_prefixes, chunk.compression)

    def _take(self, limit: int) -> tuple[Any, int]:
        """Return the next rows that fit a piece, at least one and at most `limit`, and their size."""
        try:
            while self._left is None or not self._left.num_rows:
                self._left = next(self._batches)
                self._sizes = sum(map(row_sizes, self._left.columns), np.zeros(self._left.num_rows, np.int64))
        except StopIteration:
            raise DataLoss(f"the file ends before row {self._row}") from None
        except OversizedPages as err:
            if self._slow_group == (group := self._group_of(self._row)[0]):
                raise DataLoss(f"near row {self._row}: {err}") from err
            # Rows may be larger than the metadata says: this row group is read again, row by row.
            self._slow_group, self._left = group, None
            self.seek(self._row, 0)
            return self._take(limit)
        except _BROKEN as err:
            raise DataLoss(f"broken near row {self._row}: {str(err)[:300]}") from err
        sizes = self._sizes[: min(limit, PIECE_ROWS)]
        count = max(1, int(np.searchsorted(np.cumsum(sizes), PIECE_BYTES, side="right")))
        taken, self._left = self._left.slice(0, count), self._left.slice(count)
        size, self._sizes = int(self._sizes[:count].sum()), self._sizes[count:]
        self._row += count
        return taken, size

    def _group_of(self, row: int) -> tuple[int, int]:
        start = 0
        for index, rows in enumerate(self._groups):
            if row < start + rows:
                return index, start
            start += rows
        return len(self._groups), start

    def close(self) -> None:
        self._file.close(force=True)
        self._guard.close()


def open_parquet(file: BinaryIO, **options: Any) -> Any:
    """Return the pyarrow.parquet.ParquetFile of `file`.

    Raises:
        InvalidArgument: `file` is no Parquet file; its metadata is too large. `file` is closed then.
    """
    try:
        _check_footer(file)
        return pq.ParquetFile(
            file,
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
            thrift_string_size_limit=_THRIFT_BYTES,
            thrift_container_size_limit=_THRIFT_ELEMENTS,
            **options,
        )
    except _BROKEN as err:
        file.close()
        raise InvalidArgument(f"not a Parquet file: {str(err)[:300]}") from err


def _check_footer(file: BinaryIO) -> None:
    """Check the size that a file claims for its metadata. Raises ValueError."""
    if (size := file.seek(0, io.SEEK_END)) >= 8:
        file.seek(size - 8)
        if (claimed := int.from_bytes(file.read(4), "little")) > FOOTER_BYTES:
            raise ValueError(
                f"its metadata has {claimed} bytes, at most {FOOTER_BYTES} are accepted: write larger row groups, or "
                "several files"
            )
    file.seek(0)


def row_bytes(file: Any) -> float:
    """Return the approximate size in memory of a row of a ParquetFile."""
    metadata = file.metadata
    total = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return float(total / max(metadata.num_rows, 1))


def _paths(metadata: Any) -> list[str]:
    """Return the path of each column of values, as in `x.list.element`."""
    return [metadata.schema.column(n).path for n in range(metadata.num_columns)]


def _width_of(schema: Any) -> int:
    """Return the bytes of a value; 0 for texts and bytes."""
    return _WIDTHS.get(schema.physical_type, int(schema.length))


def _without_dictionary(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
