"""Sizes of a model version's outputs: they bound a batch as inputs do, and are reserved before a run.

signature ──every dimension is fixed──> bytes of a row, for all requests
          └──one varies, or BYTES──> bytes of a row by stack key, learned from runs; a new key runs alone first
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from services.infer.requests.ragged import Value, arrays
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor, data_bytes

UNRESERVED_BYTES = 1 << 20
"""Outputs of a batch that are not reserved: as many small batches as there are instances need no bound."""

# Stack keys that are remembered: shapes come from callers. A forgotten key runs alone once more.
_MAX_KEYS = 1_024

# What was measured may come from the content of one caller's input. It never shuts others out: a request reserves no
# more than a response may have, which an idle server always has.
_MOST_LEARNED_BYTES = 128 << 20

# Elements of BYTES that are measured; the others count as these do.
_MEASURED_ELEMENTS = 1_024

# Memory of an element of BYTES beside its text.
_ELEMENT_BYTES = 56

# A key forgets an eighth of its largest row with each smaller run: the content of inputs may change the size.
_DECAY = 8


class OutputSizes:
    """Bytes of the outputs of one row, and the rows whose outputs fit a batch."""

    __slots__ = ("_by_key", "_max_bytes", "_row_bytes", "is_learning")

    def __init__(self, max_bytes: int, row_bytes: int | None) -> None:
        """Bound the outputs of a batch to `max_bytes`; `row_bytes` None: rows are measured."""
        self._max_bytes = max_bytes
        self._row_bytes = row_bytes
        self._by_key: dict[Hashable, int] = {}
        self.is_learning = row_bytes is None

    @classmethod
    def of(cls, signature: Signature, max_bytes: int) -> OutputSizes:
        """Return the sizes of a model's outputs."""
        skip = 1 if signature.max_batch_size else 0
        row_bytes = 0
        for spec in signature.outputs:
            dims = spec.shape[skip:]
            if spec.datatype.is_bytes or spec.is_ragged or any(dim < 0 for dim in dims):
                return cls(max_bytes, None)
            row_bytes += math.prod(dims) * spec.datatype.dtype.itemsize
        return cls(max_bytes, row_bytes)

    def row_bytes(self, key: Hashable) -> int:
        """Return the expected bytes of the outputs of one row; 0 for a key that nothing has measured."""
        return self._by_key.get(key, 0) if self._row_bytes is None else self._row_bytes

    def reservation(self, key: Hashable, rows: int) -> int:
        """Return the bytes that a request of `rows` rows reserves before its run."""
        size = self.row_bytes(key) * rows
        return min(size, _MOST_LEARNED_BYTES) if self.is_learning else size

    def max_rows(self, key: Hashable) -> int:
        """Return the rows whose outputs fit a batch, at least one; one for a key that nothing has measured."""
        row_bytes = self._by_key.get(key) if self._row_bytes is None else self._row_bytes
        if row_bytes is None:
            return 1
        return max(self._max_bytes // row_bytes, 1) if row_bytes else _ANY_ROWS

    def add(self, key: Hashable, rows: int, outputs: Sequence[Value]) -> None:
        """Learn from the outputs of a request of `rows` rows."""
        row_bytes = sum(_held_bytes(array) for value in outputs for array in arrays(value)) // rows
        row_bytes = min(row_bytes, _MOST_LEARNED_BYTES)
        known = self._by_key.get(key)
        if known is None and len(self._by_key) >= _MAX_KEYS:
            del self._by_key[next(iter(self._by_key))]
        self._by_key[key] = row_bytes if known is None else max(row_bytes, known - known // _DECAY)


def _held_bytes(array: Tensor) -> int:
    size = array.size if array.dtype == object else 0
    if not size:
        return array.nbytes
    some = array.reshape(-1)[:_MEASURED_ELEMENTS]
    return (data_bytes(some) + _ELEMENT_BYTES * some.size) * size // some.size


# Rows of any number fit.
_ANY_ROWS = 1 << 31

UNBOUNDED = OutputSizes(0, 0)
"""Sizes of outputs that bound nothing."""
