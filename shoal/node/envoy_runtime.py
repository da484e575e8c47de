"""Envoy's runtime layer: limits of connections, of calls in one iteration, and of calls that a client may reset.

By default, Envoy closes a connection with all its calls when half of the first 500 calls were reset within a second.
Callers with deadlines and cancellations reset many calls: one such caller would end the calls of all that share its
connection.
"""

from __future__ import annotations

from typing import Any

from shoal.node.envoy_overload import connection_limits

# A connection reaches this number of resets only after seconds.
_CALLS = 50_000

# Calls of one connection that Envoy begins in one iteration of its event loop; by default, all that have arrived.
# Callers on other connections wait for the iteration, at 30 us a call. At 4, a call of 64 in flight costs a tenth more
# processor time, since workers get their calls in smaller groups; at 8, no more than at 16.
_CALLS_AT_ONCE = 8


def runtime(*listeners: str) -> dict[str, Any]:
    """Return the field `layered_runtime` of a bootstrap, for an Envoy with these listeners."""
    limits = {
        "overload.premature_reset_total_stream_count": _CALLS,
        "http.max_requests_per_io_cycle": _CALLS_AT_ONCE,
        **connection_limits(*listeners),
    }
    return {"layers": [{"name": "shoal", "static_layer": limits}, {"name": "admin", "admin_layer": {}}]}
