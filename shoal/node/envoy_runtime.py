"""How many calls of one connection may be reset by the caller before Envoy takes it for an attack.

Envoy cuts a connection, and all calls on it, when half of its first 500 calls were reset within a second. Callers with
deadlines and cancellations do that by trade: who gives up often would end the calls of all who share the connection.
"""

from __future__ import annotations

from typing import Any

_CALLS = 50_000
# By then a connection that resets most of its calls has been at it for seconds, and not for a moment.

RUNTIME: dict[str, Any] = {
    "layers": [
        {"name": "shoal", "static_layer": {"overload.premature_reset_total_stream_count": _CALLS}},
        {"name": "admin", "admin_layer": {}},
    ]
}
"""Of envoy.config.bootstrap.v3.Bootstrap, the field `layered_runtime`."""
