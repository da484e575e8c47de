"""How messages write what came from outside: readable, and short whatever was sent.

A status message travels in a header, and a header that is too long breaks the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

# Model processes import this module and no protobuf.
if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor

from shoal.oip.tensors import shape_text

_NAME_LENGTH = 128
_NAMES = 32


def quoted(name: str) -> str:
    """A name in single quotes: its first 128 characters."""
    return f"'{name}'" if len(name) <= _NAME_LENGTH else f"'{name[:_NAME_LENGTH]}...' ({len(name)} characters)"


def listed(names: Iterable[str]) -> str:
    """Names, quoted, with commas; the first 32 of them."""
    shown = [quoted(name) for name in islice(names, _NAMES + 1)]
    return ", ".join(shown[:_NAMES] + ["..."] * (len(shown) > _NAMES))


written = shape_text


def enumerated(kind: EnumDescriptor, value: int) -> str:
    """The name of a value of a protobuf enum; its number when it has none, as a message from outside may hold."""
    known = kind.values_by_number.get(value)
    return known.name if known is not None else str(value)
