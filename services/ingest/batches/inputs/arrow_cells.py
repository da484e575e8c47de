"""Conversion of Arrow columns to arrays, where all rows have one shape, else to lists of Python values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from services.ingest.batches.inputs.piece import Cells


def cells_of(column: Any) -> Cells:
    """Return an array of shape [rows, ...] when no row is null and all have one shape; else a list of values."""
    found = _array_of(_plain(column))
    return column.to_pylist() if found is None else found


def _plain(column: Any) -> Any:
    """Return a column without chunks, dictionary encoding and extension type; its values stay the same."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _array_of(column: Any) -> Cells | None:
    kind = column.type
    if column.null_count:
        return None
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return None
    lengths = np.diff(_offsets(column))
    if not len(column) or (lengths != lengths[0]).any():
        return None
    inner = _array_of(_plain(column.flatten()))
    if not isinstance(inner, np.ndarray):
        return None
    return inner.reshape(len(column), int(lengths[0]), *inner.shape[1:])


def _offsets(column: Any) -> Any:
    if pa.types.is_fixed_size_list(column.type):
        return np.arange(len(column) + 1) * column.type.list_size
    return column.offsets.to_numpy(zero_copy_only=False)
