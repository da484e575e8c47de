"""Lines of a model process's output: bounded in length and in number, since each costs the server's time.

bytes ──lines──> as many as the budget has ──> log
            └──> others, counted ──> "… dropped N lines"
"""

from __future__ import annotations

import time
from collections.abc import Callable

# A longer line is split: a model may write output without line breaks.
_LINE_BYTES = 8192

# Lines that may come at once, and lines a second afterwards: each takes the interpreter's lock.
BURST, RATE = 1_000, 100

# Interval at which dropped lines are reported while more come.
_REPORT_S = 1.0


class OutputLines:
    """Splits the output of one process into lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rest = b""
        self._budget, self._filled_at = float(BURST), clock()
        self._dropped = 0
        self._reported_at = -_REPORT_S

    @property
    def is_over_budget(self) -> bool:
        """True while lines are dropped: the output should be read slowly."""
        return self._dropped > 0

    def add(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes and that are to be logged; no data: the end of the output."""
        now = self._clock()
        self._budget = min(self._budget + (now - self._filled_at) * RATE, BURST)
        self._filled_at = now
        texts = []
        if self._dropped and now - self._reported_at >= _REPORT_S:
            texts.append(self._report())
            self._reported_at = now
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) > _LINE_BYTES:
            lines.append(rest[:_LINE_BYTES])
            rest = rest[_LINE_BYTES:]
        if not data and rest:
            lines.append(rest)
            rest = b""
        self._rest = rest
        taken = min(len(lines), int(self._budget))
        self._budget -= taken
        self._dropped += len(lines) - taken
        texts += [line[:_LINE_BYTES].decode(errors="replace").rstrip() for line in lines[:taken]]
        # The last lines may be beyond the budget, too.
        if self._dropped and not data:
            texts.append(self._report())
        return list(filter(None, texts))

    def _report(self) -> str:
        dropped, self._dropped = self._dropped, 0
        return f"… dropped {dropped} lines: more than {RATE} lines a second"
