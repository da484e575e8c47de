"""Watch of the event loop: a timer that fires late shows a stall. Stalls are counted, and the long ones logged.

    tick ──25 ms──> tick ──25 ms──> (one callback runs for 300 ms) ──> tick, 275 to 300 ms late

All calls of a process wait during a stall: their deadlines, their cancellations and the health checks, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque

log = logging.getLogger(__name__)

# A stall is counted as shorter by up to one interval. A tick costs 40 us of an idle process, which it wakes, and 3 us
# of a busy one: 1.6 and 0.1 ms a second.
_TICK_S = 0.025

COUNTED_S = 0.05
"""Stalls from this length on are counted: no admitted request should cause one."""

_LOGGED_S = 0.25

# Stalls that a report lists: it has room in the headers of a response.
_RECENT = 64


class StallWatch:
    """Measures the stalls of the running event loop from `start` to `stop`."""

    def __init__(self) -> None:
        self.count = 0
        self.total_s = self.longest_s = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._set()

    def stop(self) -> None:
        self._timer.cancel()

    def _set(self) -> None:
        self._cpu_s = time.thread_time()
        # uvloop's clock does not advance during one iteration.
        self._due = time.monotonic() + _TICK_S
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        late_s = time.monotonic() - self._due
        if late_s >= COUNTED_S:
            self._add(late_s, time.thread_time() - self._cpu_s)
        self._set()

    def _add(self, stall_s: float, cpu_s: float) -> None:
        self.count += 1
        self.total_s += stall_s
        self.longest_s = max(self.longest_s, stall_s)
        self._recent.append((time.time() - stall_s, stall_s))
        if stall_s >= _LOGGED_S:
            log.warning(
                "event loop stalled for %(stall_ms)d ms, of which its thread ran for %(cpu_ms)d ms: all calls waited",
                {"event": "event_loop.stalled", "stall_ms": round(stall_s * 1000), "cpu_ms": round(cpu_s * 1000)},
            )

    def report(self) -> str:
        """Return the stalls since `start` as JSON. `recent` has the Unix time and the milliseconds of the last ones."""
        return json.dumps(
            {
                "counted_from_ms": round(COUNTED_S * 1000),
                "count": self.count,
                "total_ms": round(self.total_s * 1000),
                "longest_ms": round(self.longest_s * 1000),
                "recent": [[round(at, 3), round(stall_s * 1000)] for at, stall_s in self._recent],
            },
            separators=(",", ":"),
        )
