"""Header in which a call names its tenant."""

from __future__ import annotations

TENANT_HEADER = "x-shoal-tenant"


def header_value(name: str) -> str:
    """Return `name`, or "?" when a header cannot carry it: it carries printable ASCII only."""
    return name if name.isascii() and name.isprintable() else "?"
