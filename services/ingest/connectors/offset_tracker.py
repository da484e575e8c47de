"""What may be committed of a lane: everything before the first message that is not settled. A plain value.

    received   0  1  2  5  6
    settled    x  x  .  x           ──> settled up to 1; go on from 2 after a restart

Messages are settled in any order; a commit never passes one that is still under way.
"""

from __future__ import annotations

import heapq


class OffsetTracker:
    """One lane's messages under way. Positions ascend, with gaps between them where the source has gaps."""

    def __init__(self) -> None:
        self._under_way: set[int] = set()
        self._order: list[int] = []
        self._settled_up_to: int | None = None

    def received(self, position: int) -> None:
        """A message was delivered. One that is delivered again counts once."""
        if position not in self._under_way and (self._settled_up_to is None or position > self._settled_up_to):
            self._under_way.add(position)
            heapq.heappush(self._order, position)

    def settled(self, position: int) -> None:
        """A message is done with. One that is not under way changes nothing."""
        self._under_way.discard(position)
        while self._order and self._order[0] not in self._under_way:
            self._settled_up_to = heapq.heappop(self._order)

    @property
    def in_flight(self) -> int:
        """How many were received and are not settled."""
        return len(self._under_way)

    @property
    def settled_up_to(self) -> int | None:
        """The position up to which all that was received is settled, itself too. None: not even the first."""
        return self._settled_up_to
