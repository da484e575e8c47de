"""Header in which a call names its tenant."""

from __future__ import annotations

TENANT_HEADER = "x-shoal-tenant"
UNNAMEABLE = "?"
"""Value for a name that a header cannot carry: it carries printable ASCII only."""


def header_value(name: str) -> str:
    """Return `name`, or UNNAMEABLE when a header cannot carry it."""
    return name if name.isascii() and name.isprintable() else UNNAMEABLE
