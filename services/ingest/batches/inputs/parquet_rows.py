"""Reader of Parquet files, page by page, so that a row group may be larger than memory.

A row is reached by reading from the start of its row group; a cached reader continues from its position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from services.ingest.batches.inputs.arrow_cells import cells_of
from services.ingest.batches.inputs.piece import Piece, piece_rows
from shoal.errors import DataLoss, InvalidArgument

_BUFFER_BYTES = 1 << 20
_BROKEN = (pa.ArrowException, OSError, ValueError)


class ParquetRows:
    """Reader of some columns. Closes `file`.

    Raises (in the constructor and in every method):
        InvalidArgument: the file is no Parquet file. DataLoss: the file is broken, or was truncated.
    """

    def __init__(self, file: BinaryIO, columns: frozenset[str]) -> None:
        self._file = open_parquet(file)
        self._columns = [name for name in self._file.schema_arrow.names if name in columns]
        metadata = self._file.metadata
        self._groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._piece_rows = piece_rows(1 << 30, row_bytes(self._file))
        self._row = 0
        self._batches: Iterator[Any] = iter(())
        self._left: Any = None
        self.seek(0, 0)

    def seek(self, row: int, offset: int) -> None:
        """Go to row `row`: from here when the row is ahead in this row group, else from its row group's start."""
        group, start = self._group_of(row)
        if not start <= self._row <= row or self._left is None:
            self._row, self._left = start, None
            groups = range(group, len(self._groups))
            columns = self._columns or None
            self._batches = self._file.iter_batches(
                self._piece_rows, row_groups=groups, columns=columns, use_threads=False
            )
        while self._row < row:
            self._take(row - self._row)

    def read(self, limit: int) -> Piece:
        """Return the next rows."""
        first = self._row
        batch = self._take(limit)
        arrays = {name: batch.column(name) for name in self._columns}
        columns = {name: cells_of(array) for name, array in arrays.items()}
        return Piece(first, batch.num_rows, columns, arrow=arrays)

    def _take(self, limit: int) -> Any:
        try:
            while self._left is None or not self._left.num_rows:
                self._left = next(self._batches)
        except StopIteration:
            raise DataLoss(f"the file ends before row {self._row}") from None
        except _BROKEN as err:
            raise DataLoss(f"broken near row {self._row}: {str(err)[:300]}") from err
        taken, self._left = self._left.slice(0, limit), self._left.slice(limit)
        self._row += taken.num_rows
        return taken

    def _group_of(self, row: int) -> tuple[int, int]:
        start = 0
        for index, rows in enumerate(self._groups):
            if row < start + rows:
                return index, start
            start += rows
        return len(self._groups), start

    def close(self) -> None:
        self._file.close(force=True)


def open_parquet(file: BinaryIO) -> Any:
    """Return the pyarrow.parquet.ParquetFile of `file`.

    Raises:
        InvalidArgument: `file` is no Parquet file; `file` is closed then.
    """
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except _BROKEN as err:
        file.close()
        raise InvalidArgument(f"not a Parquet file: {str(err)[:300]}") from err


def row_bytes(file: Any) -> float:
    """Return the approximate size in memory of a row of a ParquetFile."""
    metadata = file.metadata
    total = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return float(total / max(metadata.num_rows, 1))
