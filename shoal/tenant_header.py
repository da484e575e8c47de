"""Headers that tell a service who sends a call, and how: its tenant, and its connection to the gateway."""

from __future__ import annotations

TENANT_HEADER = "x-shoal-tenant"
CONNECTION_HEADER = "x-shoal-connection"
"""Set by Envoy: the number of the client's connection. A call without it comes directly from its client."""
CUT_HEADER = "x-shoal-cut"
"""Set by Envoy for a request of which it has kept a piece for a moment: its `content-length` is that of a piece."""
UNNAMEABLE = "?"
"""Value for a name that a header cannot carry: it carries printable ASCII only."""


def header_value(name: str) -> str:
    """Return `name`, or UNNAMEABLE when a header cannot carry it."""
    return name if name.isascii() and name.isprintable() else UNNAMEABLE
