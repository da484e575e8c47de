"""Part of an export: a Parquet file that grows in memory, compressed, up to a bound."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from services.store.exports.table import SCHEMA, table_of
from shoal.store.v1.store_pb2 import Result

PART_BYTES = 64 << 20
"""A part is full when its responses exceed this size. An export holds that much in memory (compressed, mostly far
less), and an interrupted export repeats that much."""
# Row groups: the unit that a reader decodes. Small ones compress badly, large ones stay in memory uncompressed.
_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 10_000


class ExportPart:
    """Accepts rows until it is full, then returns the file's bytes. Every method blocks: call it in a thread."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._waiting_rows = 0
        self._bytes = 0
        self.rows = 0
        self.answers_lost = 0
        """Number of rows without their answer, which is damaged."""

    @property
    def is_full(self) -> bool:
        return self.rows >= self._most_rows or self._bytes >= PART_BYTES

    @property
    def free_rows(self) -> int:
        """Number of rows that still fit."""
        return self._most_rows - self.rows

    def add(self, results: Sequence[Result]) -> None:
        """Append rows."""
        table = table_of(results)
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        self._waiting_rows += len(results)
        self._bytes += table.nbytes
        self.rows += len(results)
        self.answers_lost += sum(bool(result.answer_lost) for result in results)
        if self._waiting_bytes >= _GROUP_BYTES or self._waiting_rows >= _GROUP_ROWS:
            self._write_group()

    def finish(self) -> bytes:
        """Return the whole file. No row can be added afterwards."""
        if self._waiting:
            self._write_group()
        self._writer.close()
        return bytes(self._sink.getvalue())

    def _write_group(self) -> None:
        self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_bytes, self._waiting_rows = [], 0, 0
