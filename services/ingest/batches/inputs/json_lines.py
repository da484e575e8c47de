"""Reader of JSON Lines: each line is an object, one row; `{"b64": "..."}` encodes bytes, as on the command line.

    {"x": [1, 2, 3, 4], "id": "a"}
    {"x": [5, 6, 7, 8], "id": "b"}

A chunk is located by the offset of its first line. Memory holds at most one piece, however long a line is.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from mesh.rest.json_text import counts, too_many
from services.ingest.batches.inputs.piece import PIECE_BYTES, PIECE_ROWS, ROW_BYTES, Piece, Span, null_column
from shoal.errors import DataLoss

_BLOCK = 4 << 20


class JsonLines:
    """Reader of some columns. Closes `file`."""

    def __init__(self, file: BinaryIO, columns: frozenset[str]) -> None:
        self._file = file
        self._columns = columns
        self._row = 0

    def seek(self, row: int, offset: int) -> None:
        """Go to row `row`, whose line begins at `offset`."""
        self._file.seek(offset)
        self._row = row

    def read(self, limit: int) -> Piece:
        """Return the next lines. A line that is no object is a failed row."""
        rows: list[dict[str, Any]] = []
        errors: dict[int, str] = {}
        nbytes = values = containers = 0
        while len(rows) < min(limit, PIECE_ROWS) and nbytes < PIECE_BYTES and not too_many(values, containers):
            line = self._file.readline(ROW_BYTES + 1)
            if not line:
                break
            nbytes += len(line)
            more = counts(line)
            values, containers = values + more[0], containers + more[1]
            try:
                rows.append(row_of(self._whole(line)))
            except ValueError as err:
                errors[len(rows)] = str(err)
                rows.append({})
        if not rows:
            raise DataLoss(f"the file ends before line {self._row + 1}: it was longer when the batch was planned")
        first, self._row = self._row, self._row + len(rows)
        columns = {name: [row.get(name) for row in rows] for name in self._columns}
        return Piece(first, len(rows), columns or {"": null_column(len(rows))}, errors)

    def _whole(self, line: bytes) -> bytes:
        """Return a complete line; skip the rest of a line that is too long, and raise ValueError."""
        if len(line) <= ROW_BYTES:
            return line
        while line and not line.endswith(b"\n"):
            line = self._file.readline(_BLOCK)
        raise ValueError(f"the line is longer than {ROW_BYTES} bytes")

    def close(self) -> None:
        self._file.close()


def spans(file: BinaryIO, chunk_rows: int, chunk_bytes: int, *, row: int = 0, offset: int = 0) -> Iterator[Span]:
    """Yield the spans of a file, from `row` (whose line begins at `offset`) on.

    Text after the last newline is a row. Memory holds one block of the file.
    """
    file.seek(offset)
    first, begin, at, rows = row, offset, offset, 0
    while block := file.read(_BLOCK):
        ends = at + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
        at += len(block)
        for end in _cuts(ends, rows, begin, chunk_rows, chunk_bytes):
            count = int(np.searchsorted(ends, end, side="right"))
            rows += count
            ends = ends[count:]
            yield Span(first, rows, begin, end)
            first, begin, rows = first + rows, end, 0
        rows += len(ends)
    if at > begin:
        yield Span(first, rows + _has_tail(file, at), begin, at)


def _cuts(ends: Any, rows: int, begin: int, chunk_rows: int, chunk_bytes: int) -> Iterator[int]:
    """Yield the line ends at which a chunk is full."""
    at = 0
    while at < len(ends):
        by_rows = at + chunk_rows - rows - 1
        by_bytes = int(np.searchsorted(ends, begin + chunk_bytes))
        last = max(at, min(by_rows, by_bytes))
        if last >= len(ends):
            return
        yield int(ends[last])
        at, rows, begin = last + 1, 0, int(ends[last])


def _has_tail(file: BinaryIO, size: int) -> int:
    """Return 1 when the file does not end with a newline, so that its last line counts; else 0."""
    file.seek(size - 1)
    return int(file.read(1) != b"\n")


def row_of(line: bytes) -> dict[str, Any]:
    """Return the object of a line. Its parse holds the interpreter, so that its values are counted before.

    Raises:
        ValueError: it is no object, or has too many values.
    """
    if problem := too_many(*counts(line)):
        raise ValueError(f"the line has {problem} are accepted: write such rows as Parquet or NPZ")
    try:
        return _columns(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _columns(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as err:
        raise ValueError(f"not JSON: {err}" if line.strip() else "an empty line: expected an object") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object of columns by name, got {type(found).__name__}")
    return {key: _decoded(value) for key, value in found.items()}


def _decoded(value: Any) -> Any:
    """Return `value` with each `{"b64": ...}` replaced by its bytes."""
    if isinstance(value, list):
        # Lists of numbers are the common case, and need no check of each element.
        return [_decoded(item) for item in value] if value and isinstance(value[0], list | dict) else value
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except binascii.Error as err:
            raise ValueError(f"b64 {value['b64'][:20]!r}: {err}") from None
    return value
