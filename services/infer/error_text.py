"""Text of client-supplied values in error messages: readable, and short whatever the client sent.

A gRPC status message is sent in a header, and a header that is too long breaks the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

# `quoted` is the same in the mesh.
from shoal.errors import quoted as quoted

# Model processes import this module and no protobuf.
if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor

_NAMES = 32


def listed(names: Iterable[str]) -> str:
    """Return the first 32 names, quoted and separated by commas."""
    shown = [quoted(name) for name in islice(names, _NAMES + 1)]
    return ", ".join(shown[:_NAMES] + ["..."] * (len(shown) > _NAMES))


def enumerated(kind: EnumDescriptor, value: int) -> str:
    """Return the name of a protobuf enum's value, or the number when the enum has no such value."""
    known = kind.values_by_number.get(value)
    return known.name if known is not None else str(value)
