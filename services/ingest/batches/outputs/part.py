"""Results of one chunk, in two local files that are moved to the output when they are complete:

    part-00000012.parquet           the succeeded rows
    _dead/part-00000012.parquet     the failed rows, with status code and reason

Memory is bounded: a row group is written as soon as it is large. All methods block: run them in a thread.
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
"""Size at which a row group is written."""
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
    """Writer of one chunk's part in `folder`. Use it as `with`; files that are still there at the end are removed."""

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

    def add(self, origins: RowOrigins, kept: Mapping[str, Any], outputs: Mapping[str, Array]) -> None:
        """Add succeeded rows, in their order.

        Raises:
            ValueError: a value does not fit the type of its column.
        """
        arrays = _origin_columns(origins)
        arrays += [kept[name] for name in self._columns.kept]
        arrays += [self._columns.array(spec, outputs[spec.name]) for spec in self._columns.outputs]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._tables.append(table)
        self._rows += table.num_rows
        self._held += table.nbytes
        if self._held >= GROUP_BYTES:
            self._flush()

    def add_failed(self, origins: RowOrigins, errors: Sequence[RowError]) -> None:
        """Add failed rows."""
        self._codes.update(error.code for error in errors)
        table = pa.Table.from_arrays(
            [
                *_origin_columns(origins),
                pa.array([error.code for error in errors], pa.string()),
                pa.array([_printable(error.reason) for error in errors], pa.string()),
                pa.array([error.attempts for error in errors], pa.int32()),
            ],
            schema=_DEAD,
        )
        self._writer(self.dead_file, _DEAD).write_table(table)

    def finish(self) -> PartSummary:
        """Complete the files. A file without rows is not created."""
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


def _origin_columns(origins: RowOrigins) -> list[Any]:
    sources = pa.array(origins.sources, pa.string()).dictionary_encode()
    return [pa.array(origins.rows, pa.int64()), sources, pa.array(origins.source_rows, pa.int64())]


def _printable(reason: str) -> str:
    return reason[:REASON_CHARS].encode(errors="replace").decode()
