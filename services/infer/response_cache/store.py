"""Table of cached outputs for all models of a process: LRU, bounded in bytes."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.infer.requests import ragged
from services.infer.requests.ragged import Value
from services.infer.requests.tensors import Tensor

DEFAULT_BYTES = 64 << 20

# One entry may take an eighth of the capacity: a larger one would evict many that are worth more.
_LARGEST_SHARE = 8

# Python's overhead for an entry (key, dictionary slots, tuple) and for an array beside its data, rounded up.
_ENTRY_BYTES = 600
_ARRAY_BYTES = 200


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: int
    outputs: tuple[Value, ...]
    size_bytes: int
    expires: float


class ResponseStore:
    """LRU table of outputs by key. Not thread-safe: only the event loop's thread uses a store."""

    def __init__(self, limit_bytes: int = DEFAULT_BYTES) -> None:
        """Bound the total size to `limit_bytes`; 0: no outputs are stored."""
        self._limit = limit_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._owners: dict[int, set[bytes]] = {}
        self._last_owner = 0
        self.size_bytes = 0
        """Size of all stored outputs."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def largest_bytes(self) -> int:
        """Largest size that is stored."""
        return self._limit // _LARGEST_SHARE

    def owner(self) -> int:
        """Return a new owner id; the outputs of an owner are visible only under its id."""
        self._last_owner += 1
        self._owners[self._last_owner] = set()
        return self._last_owner

    def get(self, owner: int, key: bytes, now: float) -> tuple[Value, ...] | None:
        """Return the owner's outputs under `key`, or None when there are none or they have expired."""
        entry = self._entries.get(key)
        if entry is None or entry.owner != owner:
            return None
        if now >= entry.expires:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.outputs

    def put(self, owner: int, key: bytes, outputs: Sequence[Value], *, expires: float = math.inf) -> bool:
        """Store immutable outputs (see `frozen`); return False when they are too large or the owner was dropped."""
        if owner not in self._owners:  # Dropped while the result was on its way.
            return False
        size = size_bytes(outputs)
        if size > self.largest_bytes:
            return False
        if key in self._entries:
            self._remove(key)
        while self.size_bytes + size > self._limit:
            self._remove(next(iter(self._entries)))
        self._entries[key] = _Entry(owner, tuple(outputs), size, expires)
        self._owners[owner].add(key)
        self.size_bytes += size
        return True

    def drop(self, owner: int) -> None:
        """Remove the owner and all of its outputs."""
        for key in list(self._owners.get(owner, ())):
            self._remove(key)
        self._owners.pop(owner, None)

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.size_bytes -= entry.size_bytes
        self._owners[entry.owner].discard(key)


def size_bytes(outputs: Sequence[Value]) -> int:
    """Return the memory that stored `outputs` take, Python's overhead included."""
    size = _ENTRY_BYTES + _ARRAY_BYTES * sum(len(ragged.arrays(output)) for output in outputs)
    for array in (array for output in outputs for array in ragged.arrays(output)):
        size += array.nbytes
        if array.dtype == object:
            size += sum(map(sys.getsizeof, array.reshape(-1)))
    return size


def frozen(outputs: Sequence[Value]) -> tuple[Value, ...]:
    """Return read-only copies of `outputs`. Outputs are views of a whole batch, which a view would keep in memory."""
    return tuple(list(map(_frozen, out)) if isinstance(out, list) else _frozen(out) for out in outputs)


def _frozen(output: Tensor) -> Tensor:
    copy = np.array(output, order="C", copy=True)
    if copy.dtype == object:
        flat = copy.reshape(-1)
        for index, element in enumerate(flat):
            # A bytearray is mutable.
            if not isinstance(element, str | bytes):
                flat[index] = bytes(element)
    copy.flags.writeable = False
    return copy
