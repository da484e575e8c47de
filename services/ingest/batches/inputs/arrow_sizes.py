"""Sizes of the rows of an Arrow array, without its dictionaries decoded: a row of 4 bytes may stand for megabytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def row_sizes(array: Any) -> NDArray[np.int64]:
    """Return the bytes that each row takes once its dictionaries are decoded."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind, count = array.type, len(array)
    if width := _width(kind):
        return np.full(count, width, np.int64)
    if pa.types.is_dictionary(kind):
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        values = row_sizes(array.dictionary)
        return np.asarray(values[indices]) if len(values) else np.zeros(count, np.int64)
    if pa.types.is_fixed_size_list(kind):
        first, size = array.offset * kind.list_size, count * kind.list_size
        inner = row_sizes(array.values)[first : first + size]
        return np.asarray(inner.reshape(count, kind.list_size).sum(axis=1))
    if pa.types.is_map(kind):
        return _sums(row_sizes(array.keys) + row_sizes(array.items), array.offsets)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if width := _width(kind.value_type):
            return np.asarray(np.diff(array.offsets.to_numpy()).astype(np.int64) * width)
        return _sums(row_sizes(array.values), array.offsets)
    if pa.types.is_struct(kind):
        return sum((row_sizes(array.field(n)) for n in range(kind.num_fields)), np.zeros(count, np.int64))
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
    try:
        lengths = pc.binary_length(array).fill_null(0)
    except pa.ArrowNotImplementedError:
        # No kind is known to come here from a Parquet file: each row counts as the whole.
        return np.full(count, array.nbytes, np.int64)
    return np.asarray(lengths.to_numpy(zero_copy_only=False)).astype(np.int64)


def _width(kind: Any) -> int:
    """Return the bytes of a value; 0 for a kind whose values differ in size, or hold others."""
    if pa.types.is_dictionary(kind) or pa.types.is_nested(kind):
        return 0
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return 0


def _sums(sizes: NDArray[np.int64], offsets: Any) -> NDArray[np.int64]:
    """Return the sums of sizes between offsets."""
    return np.asarray(np.diff(np.concatenate([[0], np.cumsum(sizes)])[offsets.to_numpy()]))
