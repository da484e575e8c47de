"""Envoy's runtime layer: its limit of calls that a client may reset on one connection.

By default, Envoy closes a connection with all its calls when half of the first 500 calls were reset within a second.
Callers with deadlines and cancellations reset many calls: one such caller would end the calls of all that share its
connection.
"""

from __future__ import annotations

from typing import Any

# A connection reaches this number of resets only after seconds.
_CALLS = 50_000

RUNTIME: dict[str, Any] = {
    "layers": [
        {"name": "shoal", "static_layer": {"overload.premature_reset_total_stream_count": _CALLS}},
        {"name": "admin", "admin_layer": {}},
    ]
}
"""Value of the field `layered_runtime` of envoy.config.bootstrap.v3.Bootstrap."""
