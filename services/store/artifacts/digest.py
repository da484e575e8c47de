"""Names of artifacts: the SHA-256 of their bytes, as 64 lower-case hex digits."""

from __future__ import annotations

import re

from shoal.errors import InvalidArgument

_FORM = re.compile(r"[0-9a-f]{64}")


def checked(value: str, field: str) -> str:
    """`value`, when it is a digest.

    Raises:
        InvalidArgument: it is not; `field` says where it stood.
    """
    if not _FORM.fullmatch(value):
        raise InvalidArgument(f"{field}: expected 64 lower-case hex digits of a SHA-256, got {brief(value)}")
    return value


def brief(value: str) -> str:
    """A hostile string as an error text may show it: escaped, and short."""
    return ascii(value if len(value) <= 80 else value[:77] + "...")
