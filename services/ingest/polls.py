"""Intervals of polls for the work of other instances."""

from __future__ import annotations

from mesh.process.backoff import Backoff

_IDLE_FACTOR = 4


def polls(poll_ms: int) -> Backoff:
    """Return the intervals of successive polls that find nothing: from `poll_ms` to four times as long.

    An instance's own work wakes it. Only work of other instances waits for a poll.
    """
    return Backoff(poll_ms / 1000, _IDLE_FACTOR * poll_ms / 1000)
