"""Commit position of a partition: everything before the first message that is not settled. A plain value.

    received   0  1  2  5  6
    settled    x  x  .  x           ──> settled up to 1; a restart continues at 2

Messages are settled in any order; a commit never passes a message that is still in flight.
"""

from __future__ import annotations

import heapq


class OffsetTracker:
    """Messages of one partition that are in flight. Positions ascend, with gaps where the source has gaps."""

    def __init__(self) -> None:
        self._in_flight: set[int] = set()
        self._order: list[int] = []
        self._settled_up_to: int | None = None

    def received(self, position: int) -> None:
        """Record a delivered message. A message that is delivered again counts once."""
        if position not in self._in_flight and (self._settled_up_to is None or position > self._settled_up_to):
            self._in_flight.add(position)
            heapq.heappush(self._order, position)

    def settled(self, position: int) -> None:
        """Record a settled message. A message that is not in flight changes nothing."""
        self._in_flight.discard(position)
        while self._order and self._order[0] not in self._in_flight:
            self._settled_up_to = heapq.heappop(self._order)

    @property
    def in_flight(self) -> int:
        """Number of messages that were received and are not settled."""
        return len(self._in_flight)

    @property
    def settled_up_to(self) -> int | None:
        """Last position up to which all received messages are settled. None: the first is not settled yet."""
        return self._settled_up_to
