"""Random `kill -9`, of one process or two at once, with waits between them: a storm over a node."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence

LONGEST_WAIT_S = 8.0
"""Longer than most parts take to be back, and shorter than some: so kills also meet what is just starting."""


class Storm:
    """Kills what `victims()` names, by `kill(name)`, as the seed has it."""

    def __init__(self, victims: Callable[[], Sequence[str]], kill: Callable[[str], object], seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self._victims = victims
        self._kill = kill
        self._random = random.Random(seed)
        self._deck: list[str] = []

    async def blow(self, seconds: float, least_victims: int) -> None:
        """Kills for so long, and until so many different ones have died."""
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end or len(self.kills) < least_victims:
            await asyncio.sleep(self._random.uniform(0.2, LONGEST_WAIT_S))
            self.strike()

    def strike(self) -> list[str]:
        """Kill one victim, or (two times in five) a pair; return the names of those that were alive."""
        killed = []
        for name in self._drawn(2 if self._random.random() < 0.4 else 1):
            try:
                self._kill(name)
            except (ProcessLookupError, KeyError):
                # An earlier strike killed it, and it is not back yet: its turn comes again in this round.
                self._deck.append(name)
                continue
            killed.append(name)
        self.kills.update(killed)
        return killed

    def _drawn(self, count: int) -> list[str]:
        """Draw different names. Each round deals every victim once, in random order, so that none is left out."""
        names = sorted(self._victims())
        self._deck = [name for name in self._deck if name in names]
        if len(self._deck) < count:
            self._deck += self._random.sample(names, len(names))
        drawn = list(dict.fromkeys(self._deck))[:count]
        for name in drawn:
            self._deck.remove(name)
        return drawn
