"""Mapping of columns to model inputs, and checks that the files fit it, done before the batch runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from services.ingest.batches.batch import Batch, Format
from services.ingest.batches.inputs import npz_rows
from services.ingest.batches.inputs.json_lines import JsonLines, row_of
from services.ingest.batches.inputs.object_rows import COLUMNS as OBJECT_COLUMNS
from services.ingest.batches.inputs.parquet_rows import open_parquet
from services.ingest.batches.inputs.piece import PIECE_BYTES, ROW_BYTES, Piece
from services.ingest.batches.outputs.columns import Columns
from services.ingest.batches.rows.fitting import check_array, fit
from services.ingest.batches.rows.signature import Signature, TensorSpec
from shoal.errors import DataLoss, InvalidArgument

SAMPLE_ROWS = 50
"""First rows, of PIECE_BYTES at most, of a JSON Lines file. The columns and their types are inferred from them."""
_AS_JSON = {b"shoal": b"json"}


@dataclass(frozen=True)
class RequestedColumns:
    """Columns that are read of each row."""

    inputs: tuple[tuple[TensorSpec, str], ...]
    """Pairs: an input of the model, and the column that feeds it."""
    kept: Any
    """Arrow schema of the columns that are carried over."""

    @classmethod
    def of(cls, batch: Batch) -> RequestedColumns:
        """Return the requested columns of a batch."""
        specs = {spec.name: spec for spec in batch.signature.inputs}
        kept = pa.ipc.read_schema(pa.BufferReader(batch.kept)) if batch.kept else pa.schema([])
        return cls(tuple((specs[name], column) for name, column in batch.columns), kept)

    @property
    def columns(self) -> frozenset[str]:
        """Names of all columns that are read."""
        return frozenset(column for _, column in self.inputs) | frozenset(self.kept.names)


def result_columns(batch: Batch) -> Columns:
    """Return the columns of a batch's parts."""
    kept = {field.name: field.type for field in RequestedColumns.of(batch).kept}
    return Columns(batch.signature.outputs, frozenset(batch.texts), kept)


def map_columns(
    model: str, signature: Signature, column_of: Mapping[str, str], available: Sequence[str]
) -> tuple[tuple[TensorSpec, str], ...]:
    """Return each input of the model with its column: from `column_of`, else the column of the input's name.

    Optional inputs without a column are left out.

    Raises:
        InvalidArgument: a column is missing; the message names the model's inputs and the available columns.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    columns = ", ".join(sorted(available)) or "none"
    for name in column_of:
        if name not in specs:
            raise InvalidArgument(f"columns: model {model!r} has no input {name!r}: it takes {signature.takes}")
    found = []
    for name, spec in specs.items():
        column = column_of.get(name, name)
        if column in available:
            found.append((spec, column))
        elif name in column_of or not spec.is_optional:
            hint = "" if name in column_of else f": say which it is, as in columns {{{name!r}: 'COLUMN'}}"
            raise InvalidArgument(
                f"columns: input {name!r} of model {model!r} needs a column {column!r}, "
                f"and the inputs have the columns {columns}{hint}"
            )
    if not found:
        raise InvalidArgument(
            f"columns: no column feeds model {model!r}: it takes {signature.takes}, there are {columns}"
        )
    return tuple(found)


def object_columns(
    model: str, signature: Signature, column_of: Mapping[str, str]
) -> tuple[tuple[TensorSpec, str], ...]:
    """Map the columns of a prefix of objects: a single required BYTES input gets the content by default.

    Raises:
        InvalidArgument: the mapping is ambiguous, or a column is missing.
    """
    texts = [spec.name for spec in signature.inputs if spec.datatype == "BYTES" and not spec.is_optional]
    if not column_of and len(texts) == 1:
        column_of = {texts[0]: "content"}
    found = map_columns(model, signature, column_of, OBJECT_COLUMNS)
    for spec, column in found:
        check_array(spec, column, np.dtype(object), ())
    return found


def available_columns(kind: Format, file: BinaryIO) -> list[str]:
    """Return the names of a file's columns; for JSON Lines, those of its first rows.

    Raises:
        InvalidArgument: the file is not of the format `kind`.
    """
    if kind is Format.PARQUET:
        return list(open_parquet(file).schema_arrow.names)
    if kind is Format.NPZ:
        return [member.name for member in npz_rows.members(file)]
    return sorted({name for row in _sample(file) for name in row})


def kept_schema(kind: Format, file: BinaryIO, names: Sequence[str]) -> Any:
    """Return the Arrow schema of the columns `names`, with the types of this file.

    Raises:
        InvalidArgument: the file has no such column.
    """
    if kind is Format.OBJECTS:
        if names:
            raise InvalidArgument("keep_columns: objects have no columns to keep; `source` is their URL anyway")
        return pa.schema([])
    available = available_columns(kind, file)
    for name in names:
        if name not in available:
            raise InvalidArgument(f"keep_columns: no column {name!r}: there are {', '.join(available) or 'none'}")
    file.seek(0)
    if kind is Format.PARQUET:
        schema = open_parquet(file).schema_arrow
        return pa.schema([pa.field(name, _plain(schema.field(name).type)) for name in names])
    if kind is Format.NPZ:
        members = {member.name: member for member in npz_rows.members(file)}
        return pa.schema([pa.field(name, _numpy_type(members[name])) for name in names])
    rows = _sample(file)
    return pa.schema([_json_field(name, [row.get(name) for row in rows]) for name in names])


def check_file(kind: Format, file: BinaryIO, requested: RequestedColumns) -> None:
    """Check that a file has the requested columns, in types that may fit.

    Raises:
        InvalidArgument: names the column, the expected type and the type of the file.
    """
    file.seek(0)
    if kind is Format.PARQUET:
        _check_parquet(open_parquet(file).schema_arrow, requested)
    elif kind is Format.NPZ:
        _check_npz(npz_rows.members(file), requested)
    elif kind is Format.JSONL:
        _check_lines(file, requested)
    file.seek(0)


def kept_arrays(requested: RequestedColumns, piece: Piece) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the columns that are carried over as Arrow arrays, and the errors of rows that do not fit their types."""
    arrays: dict[str, Any] = {}
    errors: dict[int, str] = {}
    for field in requested.kept:
        if field.name in piece.arrow:
            arrays[field.name] = _decoded(piece.arrow[field.name])
            continue
        cells = piece.columns[field.name]
        values = list(cells) if isinstance(cells, np.ndarray) and cells.ndim > 1 else cells
        if field.metadata == _AS_JSON:
            values = [None if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in values]
        arrays[field.name] = _array(field, values, errors)
    return arrays, errors


def _array(field: Any, values: Any, errors: dict[int, str]) -> Any:
    values = values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind in "SU" else values
    if not isinstance(values, list) or not any(_has_fraction(value, field.type) for value in values):
        try:
            return pa.array(values, field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            pass
    scalars: list[Any] = []
    for row, value in enumerate(values):
        try:
            if _has_fraction(value, field.type):
                raise ValueError("Arrow would cut it off")
            scalars.append(pa.scalar(value, field.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            errors[row] = f"column {field.name!r}: {str(value)[:80]!r} is not {field.type}, as the first rows are"
            scalars.append(pa.scalar(None, field.type))
    return pa.array(scalars, field.type)


def _has_fraction(value: Any, kind: Any) -> bool:
    """Return True when `value` has a fraction, and `kind` has integers: Arrow takes 1.5 as 1."""
    if pa.types.is_integer(kind):
        return isinstance(value, float | np.floating) and not value.is_integer()
    if pa.types.is_list(kind) and isinstance(value, list | np.ndarray):
        return any(_has_fraction(element, kind.value_type) for element in value)
    return False


def _decoded(array: Any) -> Any:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_parquet(schema: Any, requested: RequestedColumns) -> None:
    for name in sorted(requested.columns):
        if schema.names.count(name) != 1:
            raise InvalidArgument(f"no column {name!r}: there are {', '.join(schema.names) or 'none'}")
    for spec, column in requested.inputs:
        _check_type(spec, column, _plain(schema.field(column).type))
    for field in requested.kept:
        kind = _plain(schema.field(field.name).type)
        if kind != field.type:
            raise InvalidArgument(f"column {field.name!r} is {kind}; in the first file it is {field.type}")


def _check_type(spec: TensorSpec, column: str, kind: Any) -> None:
    shape, leaf = [], kind
    while pa.types.is_list(leaf) or pa.types.is_large_list(leaf) or pa.types.is_fixed_size_list(leaf):
        shape.append(leaf.list_size if pa.types.is_fixed_size_list(leaf) else -1)
        leaf = leaf.value_type
    if isinstance(leaf, pa.BaseExtensionType):
        # The type of an extension does not show the shape of its storage; each row is checked instead.
        return
    is_text = pa.types.is_string(leaf) or pa.types.is_binary(leaf) or pa.types.is_large_string(leaf)
    is_text = is_text or pa.types.is_large_binary(leaf) or pa.types.is_fixed_size_binary(leaf)
    is_number = pa.types.is_integer(leaf) or pa.types.is_floating(leaf) or pa.types.is_boolean(leaf)
    fits = is_text if spec.datatype == "BYTES" else is_number
    if not fits or not _may_fit(shape, spec.shape):
        raise InvalidArgument(f"column {column!r} holds {kind}, and the model takes {spec}")


def _may_fit(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Return True when cells of `shape` (-1: any length) may be rows of the expected shape."""
    if len(shape) == len(expected) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(shape, expected, strict=True)
    ):
        return True
    is_flat = len(shape) <= 1 and -1 not in expected
    return is_flat and (-1 in shape or math.prod(shape) == math.prod(expected))


def _check_npz(members: Sequence[npz_rows.Member], requested: RequestedColumns) -> None:
    found = {member.name: member for member in members}
    for name in sorted(requested.columns):
        if name not in found:
            raise InvalidArgument(f"no array {name!r}: there are {', '.join(sorted(found)) or 'none'}")
    lengths = {name: found[name].shape[0] for name in sorted(requested.columns)}
    if len(set(lengths.values())) > 1:
        raise InvalidArgument(f"the arrays have different numbers of rows: {lengths}")
    for spec, column in requested.inputs:
        check_array(spec, column, found[column].dtype, found[column].shape[1:])
    for field in requested.kept:
        if _numpy_type(found[field.name]) != field.type:
            raise InvalidArgument(f"array {field.name!r} is not {field.type}, which it is in the first file")


def _check_lines(file: BinaryIO, requested: RequestedColumns) -> None:
    try:
        piece = JsonLines(file, requested.columns).read(SAMPLE_ROWS)
    except DataLoss:
        # An empty file is valid: it has no rows.
        return
    errors = dict(piece.errors)
    for spec, column in requested.inputs:
        for row, reason in fit(spec, piece.columns[column]).errors.items():
            errors.setdefault(row, reason)
    if len(errors) == piece.count:
        raise InvalidArgument(f"none of the first {piece.count} rows is fit; row 0: {errors[0]}")


def _sample(file: BinaryIO) -> list[dict[str, Any]]:
    file.seek(0)
    found = []
    for line in itertools.islice(iter(lambda: file.readline(ROW_BYTES), b""), SAMPLE_ROWS):
        with suppress(ValueError):
            found.append(row_of(line))
        if file.tell() > PIECE_BYTES:
            break
    return found


def _json_field(name: str, values: Sequence[Any]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    for known, kind in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64()), ({str}, pa.string())):
        if kinds and kinds <= known:
            return pa.field(name, kind)
    return pa.field(name, pa.string(), metadata=_AS_JSON)


def _numpy_type(member: npz_rows.Member) -> Any:
    kind = {"U": pa.string(), "S": pa.binary()}.get(member.dtype.kind)
    try:
        kind = pa.from_numpy_dtype(member.dtype) if kind is None else kind
    except pa.ArrowException:
        raise InvalidArgument(f"array {member.name!r}: dtype {member.dtype} cannot be kept") from None
    for _ in member.shape[1:]:
        kind = pa.list_(kind)
    return kind
