"""Envoy's limits as a process: memory, and connections per listener.

As the heap grows towards its ceiling, Envoy sheds the load that costs the most first:

    heap  70 %  return free memory to the system, if there is much of it; at 87.5 % all of it
          75 %  reset the streams that hold the most memory, more of them the fuller the heap
          75 %  shorten the time that a stream may make no progress, from 30 s to 1 s at 95 %
          95 %  end streams without progress for 1 s, such as idle watches (mesh.xds.routes)
          95 %  reject new requests, and close connections that send something: the more often, the fuller the heap
          98 %  accept no new connections

What was not in use for a minute or two is returned below that, too.

Fields: envoy.config.overload.v3.OverloadManager, envoy.config.bootstrap.v3.MemoryAllocatorManager.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shoal.errors import InvalidArgument

VARIABLE = "SHOAL_ENVOY_HEAP_MB"
"""Environment variable with the ceiling of Envoy's heap, in MiB."""
# One request of the largest size needs twice its 128 MiB: one copy for a retry, one on its way to the instance. That
# and an idle Envoy stay below the share at which streams are reset. With its code Envoy takes about 512 MiB.
DEFAULT_HEAP_MB = 448
# Below this, Envoy with a few hundred models would reject requests while it is idle.
_LEAST_HEAP_MB = 128

CONNECTIONS = 1024
"""Most client connections to one listener. A further connection is closed at once. An idle connection costs about
50 KiB, so all of them fit the heap."""

# Envoy samples its heap at this interval. With the default of 1 s, fast clients overrun the ceiling in between.
_REFRESH = "0.05s"
# Smallest memory of a stream that Envoy tracks, and may reset: 64 KiB. A small call is charged 16 KiB and more, since
# buffers have that size. Envoy has eight classes above, each of twice the memory of the one before.
_TRACKED_POWER = 16
# Resets happen only while the pressure changes, 50 streams at a time: many small streams that are held would stay. At
# high pressure, those without progress end early: the rest of a message, and the reading of a response, may pause for
# so long.
_SHORTEST_TIMEOUTS = {"HTTP_DOWNSTREAM_STREAM_IDLE": "1s", "HTTP_DOWNSTREAM_STREAM_FLUSH": "5s"}


def heap_bytes(environ: Mapping[str, str]) -> int:
    """Return the ceiling of Envoy's heap that `environ` sets, or the default.

    Raises:
        InvalidArgument: the variable is not a number of MiB of at least 128.
    """
    text = environ.get(VARIABLE, "").strip() or str(DEFAULT_HEAP_MB)
    if not re.fullmatch(r"[0-9]{1,7}", text) or int(text) < _LEAST_HEAP_MB:
        raise InvalidArgument(f"{VARIABLE} is {text!r}: give a whole number of MiB, at least {_LEAST_HEAP_MB}")
    return int(text) << 20


# Bytes of free memory that Envoy returns to the system each second, unless they were in use in the last minute or two.
_RETURNED_BYTES = 16 << 20


def memory(heap: int) -> dict[str, Any]:
    """Return the fields of a bootstrap about Envoy's memory, for a heap of at most `heap` bytes."""
    return {
        "overload_manager": _overload_manager(heap),
        "memory_allocator_manager": {
            "bytes_to_release": _RETURNED_BYTES,
            "memory_release_interval": "1s",
            # Beyond it, free memory is returned at once.
            "soft_memory_limit_bytes": heap * 7 // 8,
        },
    }


def _overload_manager(heap: int) -> dict[str, Any]:
    types = "type.googleapis.com/envoy"
    config = f"{types}.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig"
    monitor = "envoy.resource_monitors.fixed_heap"
    actions = {
        "reset_high_memory_stream": {"scaled": {"scaling_threshold": 0.75, "saturation_threshold": 0.92}},
        "shrink_heap": {"threshold": {"value": 0.7}},
        "stop_accepting_requests": {"threshold": {"value": 0.95}},
        "stop_accepting_connections": {"threshold": {"value": 0.98}},
    }
    return {
        "refresh_interval": _REFRESH,
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": _TRACKED_POWER},
        "resource_monitors": [{"name": monitor, "typed_config": {"@type": config, "max_heap_size_bytes": heap}}],
        # Thousands of streams that send a byte each 0.9 s make progress, and hold too little to be reset. The part of
        # the scale is the probability at each read of a connection. Clients repeat what Envoy has not begun.
        "loadshed_points": [
            {
                "name": "envoy.load_shed_points.http2_server_go_away_and_close_on_dispatch",
                "triggers": [{"name": monitor, "scaled": {"scaling_threshold": 0.95, "saturation_threshold": 0.97}}],
            }
        ],
        "actions": [
            *(
                {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": monitor, **trigger}]}
                for name, trigger in actions.items()
            ),
            {
                "name": "envoy.overload_actions.reduce_timeouts",
                "triggers": [{"name": monitor, "scaled": {"scaling_threshold": 0.75, "saturation_threshold": 0.95}}],
                "typed_config": {
                    "@type": f"{types}.config.overload.v3.ScaleTimersOverloadActionConfig",
                    "timer_scale_factors": [
                        {"timer": timer, "min_timeout": shortest} for timer, shortest in _SHORTEST_TIMEOUTS.items()
                    ],
                },
            },
        ],
    }


def connection_limits(*listeners: str) -> dict[str, Any]:
    """Return the entries of a runtime layer that limit the connections of each listener."""
    return {f"envoy.resource_limits.listener.{name}.connection_limit": CONNECTIONS for name in listeners}
