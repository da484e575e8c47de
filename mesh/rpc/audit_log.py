"""Interface of the audit log, and events that are counted before they are written.

    equal events of one second ──> one event with their count ──> the audit log

Nobody waits for counted events: the ones that cannot be written are counted on, and written later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mesh.process.tasks import Background, for_ever
from shoal.access.audit import Event
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Interval in which equal events become one entry."""
MAX_DISTINCT = 200
"""Distinct events of an interval, or while the log cannot be written. All further ones are one entry."""
_AWAY_S = 1.0


class AuditLog(Protocol):
    """Writes events to the audit log, and returns their ids once they are durable."""

    async def record(self, events: Sequence[Event]) -> Sequence[str]:
        """Write `events`. Raises ShoalError when they may not have been written."""


class CountedEvents(Background):
    """Writes an event for equal ones, each `EVERY_S`. Use as `async with`.

    Args:
        others: stands for the events beyond `MAX_DISTINCT`.
        what: names the events in the log, such as "refusals".
    """

    def __init__(self, audit_log: AuditLog, others: Event, what: str) -> None:
        self._log = audit_log
        self._others = others
        self._what = what
        # Their number, and the trace of the first.
        self._counts: dict[Event, tuple[int, str]] = {}

    def add(self, event: Event) -> None:
        """Count an event as often as its `count` says."""
        self._add(replace(event, trace_id="", count=1), event.count, event.trace_id)

    def _add(self, event: Event, count: int, trace_id: str) -> None:
        if event not in self._counts and len(self._counts) >= MAX_DISTINCT:
            event = self._others
        before, first = self._counts.get(event, (0, trace_id))
        self._counts[event] = before + count, first

    async def _run(self) -> None:
        await for_ever(f"write {self._what} to the audit log", self.write, away_s=_AWAY_S, log=log)

    async def write(self) -> float:
        """Write the events since the last call, and return the pause until the next one.

        Raises:
            ShoalError: they may not have been written; the next call writes them.
        """
        counts, self._counts = self._counts, {}
        if counts:
            try:
                await self._log.record(
                    [replace(event, count=count, trace_id=first) for event, (count, first) in counts.items()]
                )
            except ShoalError:
                for event, (count, first) in counts.items():
                    self._add(event, count, first)
                raise
        return EVERY_S
