"""Messages around large bytes, without copying those more than once: parts that are joined at the end.

A protobuf message may be cut at its fields and put together in any order (https://protobuf.dev/programming-guides/encoding,
"Message Structure"). So protobuf writes what is small, and what is large is laid behind it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from services.infer.requests.tensors import Tensor
from shoal.oip.datatypes import Datatype
from shoal.oip.tensors import to_raw

_LENGTH_DELIMITED = 2
_KEY, _VALUE = 1, 2
# The fields of an entry of any map.


class Pieces:
    """A message in parts: bytes, and arrays that lie in one piece."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: bytes) -> None:
        self.parts: list[Any] = list(parts)
        self.size = sum(map(len, parts))
        """In bytes."""

    def append(self, part: bytes | Tensor) -> None:
        """Adds bytes as they are."""
        self.parts.append(part)
        self.size += len(part) if isinstance(part, bytes) else part.nbytes

    def add(self, number: int, content: Pieces) -> None:
        """Adds field `number`: bytes, a string or a message."""
        opening = _varint(number << 3 | _LENGTH_DELIMITED) + _varint(content.size)
        self.parts.append(opening)
        self.parts.extend(content.parts)
        self.size += len(opening) + content.size

    def add_entry(self, number: int, key: str, value: Pieces) -> None:
        """Adds an entry of the map that is field `number`."""
        entry = Pieces()
        entry.add(_KEY, Pieces(key.encode()))
        entry.add(_VALUE, value)
        self.add(number, entry)

    def joined(self) -> bytes:
        """The message: the one copy."""
        return b"".join(self.parts)


def raw(arrays: Iterable[Tensor], datatype: Datatype) -> Pieces:
    """The elements of arrays, one behind the other, as the Open Inference Protocol has them raw."""
    pieces = Pieces()
    for array in arrays:
        pieces.append(to_raw(array, datatype) if datatype.is_bytes else np.ascontiguousarray(array))
    return pieces


def _varint(number: int) -> bytes:
    """A number as protobuf writes lengths and tags."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
