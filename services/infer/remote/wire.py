"""Serialization of messages with large tensors: collects parts without a copy, and joins them once at the end.

The fields of a serialized protobuf message may be concatenated in any order
(https://protobuf.dev/programming-guides/encoding, "Message Structure"). So protobuf serializes the small fields, and
the large ones are appended as raw bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from services.infer.requests.tensors import Tensor
from shoal.oip.datatypes import Datatype
from shoal.oip.tensors import to_raw

_LENGTH_DELIMITED = 2
# Field numbers of a map's entry.
_KEY, _VALUE = 1, 2


class Pieces:
    """A serialized message in parts: bytes and contiguous arrays."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: bytes) -> None:
        self.parts: list[Any] = list(parts)
        self.size = sum(map(len, parts))
        """Total size in bytes."""

    def append(self, part: bytes | Tensor) -> None:
        """Append bytes unchanged."""
        self.parts.append(part)
        self.size += len(part) if isinstance(part, bytes) else part.nbytes

    def add(self, number: int, content: Pieces) -> None:
        """Append field `number`: bytes, a string or a message."""
        opening = _varint(number << 3 | _LENGTH_DELIMITED) + _varint(content.size)
        self.parts.append(opening)
        self.parts.extend(content.parts)
        self.size += len(opening) + content.size

    def add_entry(self, number: int, key: str, value: Pieces) -> None:
        """Append an entry to the map that is field `number`."""
        entry = Pieces()
        entry.add(_KEY, Pieces(key.encode()))
        entry.add(_VALUE, value)
        self.add(number, entry)

    def joined(self) -> bytes:
        """Return the message as bytes; the only copy."""
        return b"".join(self.parts)


def raw(arrays: Iterable[Tensor], datatype: Datatype) -> Pieces:
    """Return the elements of the arrays, concatenated, in the Open Inference Protocol's raw format."""
    pieces = Pieces()
    for array in arrays:
        pieces.append(to_raw(array, datatype) if datatype.is_bytes else np.ascontiguousarray(array))
    return pieces


def _varint(number: int) -> bytes:
    """Return a number as a protobuf varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
