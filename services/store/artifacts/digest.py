"""Digests, the names of artifacts: the SHA-256 of their bytes, as 64 lower-case hex digits."""

from __future__ import annotations

import re

from shoal.errors import InvalidArgument

_FORM = re.compile(r"[0-9a-f]{64}")


def checked(value: str, field: str) -> str:
    """Return `value` when it is a digest.

    Raises:
        InvalidArgument: `value` is no digest; the message names `field`.
    """
    if not _FORM.fullmatch(value):
        raise InvalidArgument(f"{field}: expected 64 lower-case hex digits of a SHA-256, got {brief(value)}")
    return value


def brief(value: str) -> str:
    """Return an untrusted string for an error text: escaped and short."""
    return ascii(value if len(value) <= 80 else value[:77] + "...")
