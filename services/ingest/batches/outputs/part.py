"""The results of one chunk, in two local files that are put where they belong when they are whole:

    part-00000012.parquet           the rows that were answered
    _dead/part-00000012.parquet     the rows that were not: which, the status code, and why

What is in memory is bounded: a row group is written as soon as it is large. All of it blocks: for threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.ingest.batches.outputs.columns import ABOUT, Columns
from services.ingest.batches.outputs.part_summary import PartSummary, RowError, RowOrigins
from shoal.oip.tensors import Array

GROUP_BYTES = 16 << 20
"""A row group is written when it is this large."""
REASON_CHARS = 2_000
_DEAD = pa.schema(
    [
        *ABOUT,
        pa.field("code", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("attempts", pa.int32()),
    ]
)


class OutputPart:
    """Writes the part of one chunk into `folder`. Use as `with`; what is not taken away by then is removed."""

    def __init__(self, folder: Path, name: str, columns: Columns) -> None:
        self.file = folder / f"{name}.parquet"
        self.dead_file = folder / f"{name}.dead.parquet"
        self._columns = columns
        self._schema = columns.schema()
        self._writers: dict[Path, Any] = {}
        self._tables: list[Any] = []
        self._held = 0
        self._rows = 0
        self._codes: Counter[str] = Counter()

    def __enter__(self) -> OutputPart:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        for file in (self.file, self.dead_file):
            file.unlink(missing_ok=True)

    def add(self, about: RowOrigins, kept: Mapping[str, Any], outputs: Mapping[str, Array]) -> None:
        """Adds answered rows, in their order.

        Raises:
            ValueError: a value has no place in its column.
        """
        arrays = _about(about)
        arrays += [kept[name] for name in self._columns.kept]
        arrays += [self._columns.array(spec, outputs[spec.name]) for spec in self._columns.outputs]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._tables.append(table)
        self._rows += table.num_rows
        self._held += table.nbytes
        if self._held >= GROUP_BYTES:
            self._flush()

    def add_dead(self, about: RowOrigins, dead: Sequence[RowError]) -> None:
        """Adds rows that were not answered."""
        self._codes.update(each.code for each in dead)
        table = pa.Table.from_arrays(
            [
                *_about(about),
                pa.array([each.code for each in dead], pa.string()),
                pa.array([_printable(each.reason) for each in dead], pa.string()),
                pa.array([each.attempts for each in dead], pa.int32()),
            ],
            schema=_DEAD,
        )
        self._writer(self.dead_file, _DEAD).write_table(table)

    def finish(self) -> PartSummary:
        """Makes the files whole. A file without rows is not made."""
        self._flush()
        for writer in self._writers.values():
            writer.close()
        sizes = [file.stat().st_size for file in self._writers]
        self._writers = {}
        return PartSummary(self._rows, self._codes.total(), sum(sizes), dict(self._codes))

    def _flush(self) -> None:
        if self._tables:
            table = pa.concat_tables(self._tables).unify_dictionaries().combine_chunks()
            self._writer(self.file, self._schema).write_table(table)
        self._tables, self._held = [], 0

    def _writer(self, file: Path, schema: Any) -> Any:
        if file not in self._writers:
            self._writers[file] = pq.ParquetWriter(file, schema, compression="zstd")
        return self._writers[file]


def _about(about: RowOrigins) -> list[Any]:
    sources = pa.array(about.sources, pa.string()).dictionary_encode()
    return [pa.array(about.rows, pa.int64()), sources, pa.array(about.source_rows, pa.int64())]


def _printable(reason: str) -> str:
    return reason[:REASON_CHARS].encode(errors="replace").decode()
