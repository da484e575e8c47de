"""Parquet columns of the outputs: a tensor of a row becomes a value, a list, or a list of lists.

row, source, source_row     the row's origin in a file (or object); `row` counts through all files
the kept columns            as in the input
the model's outputs         FP32 [] -> float, FP32 [4] -> list<float>, BYTES -> binary (or string), BF16 -> float
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.ingest.batches.rows.signature import TensorSpec
from shoal.errors import InvalidArgument
from shoal.oip import bfloat16

_NUMBERS: Mapping[str, Any] = {
    "BOOL": pa.bool_(),
    "INT8": pa.int8(),
    "INT16": pa.int16(),
    "INT32": pa.int32(),
    "INT64": pa.int64(),
    "UINT8": pa.uint8(),
    "UINT16": pa.uint16(),
    "UINT32": pa.uint32(),
    "UINT64": pa.uint64(),
    "FP16": pa.float16(),
    "FP32": pa.float32(),
    "FP64": pa.float64(),
    "BF16": pa.float32(),
}
ABOUT = (
    pa.field("row", pa.int64()),
    pa.field("source", pa.dictionary(pa.int32(), pa.string())),
    pa.field("source_row", pa.int64()),
)
"""Columns with the origin of a row, of succeeded and of failed rows."""


@dataclass(frozen=True)
class Columns:
    """Columns of a batch's parts."""

    outputs: tuple[TensorSpec, ...]
    texts: frozenset[str]
    """Outputs of BYTES that are text."""
    kept: Mapping[str, Any]
    """Columns of the input that are carried over, with their types."""

    def schema(self) -> Any:
        """Return the Arrow schema of a part.

        Raises:
            InvalidArgument: two columns would have the same name.
        """
        names = [*(field.name for field in ABOUT), *self.kept, *(spec.name for spec in self.outputs)]
        for name in names:
            if names.count(name) > 1:
                raise InvalidArgument(
                    f"two columns of the results would be named {name!r}: leave one out, or rename it"
                )
        kept = [pa.field(name, kind) for name, kind in self.kept.items()]
        return pa.schema([*ABOUT, *kept, *(pa.field(spec.name, self._type(spec)) for spec in self.outputs)])

    def _type(self, spec: TensorSpec) -> Any:
        kind = _NUMBERS.get(spec.datatype) or (pa.string() if spec.name in self.texts else pa.binary())
        for _ in spec.shape:
            kind = pa.list_(kind)
        return kind

    def array(self, spec: TensorSpec, values: NDArray[Any]) -> Any:
        """Return the rows of an output as an Arrow array.

        Raises:
            ValueError: a text is not UTF-8.
        """
        flat = values.reshape(-1)
        if spec.datatype == "BYTES":
            elements = [item.decode() for item in flat] if spec.name in self.texts else flat.tolist()
            found = pa.array(elements, pa.string() if spec.name in self.texts else pa.binary())
        elif spec.datatype == "BF16":
            found = pa.array(bfloat16.to_float32(flat))
        else:
            found = pa.array(flat, _NUMBERS[spec.datatype])
        return _nested(found, values.shape)


def _nested(flat: Any, shape: Sequence[int]) -> Any:
    """Return the elements of an array of `shape` as lists (of lists ...), one for each row."""
    for axis in range(len(shape) - 1, 0, -1):
        lists = int(np.prod(shape[:axis], dtype=np.int64))
        offsets = np.arange(lists + 1, dtype=np.int32) * np.int32(shape[axis])
        flat = pa.ListArray.from_arrays(pa.array(offsets), flat)
    return flat
