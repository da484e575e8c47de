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

    async def blow(self, seconds: float) -> None:
        """Kills for so long."""
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(self._random.uniform(0.2, LONGEST_WAIT_S))
            self.strike()

    def strike(self) -> list[str]:
        """One strike: one victim, or (two times in five) a pair. Says whom it killed."""
        names = sorted(self._victims())
        chosen = self._random.sample(names, 2 if self._random.random() < 0.4 else 1)
        killed = []
        for name in chosen:
            try:
                self._kill(name)
            except (ProcessLookupError, KeyError):
                continue  # It is dead already, of an earlier strike, and not back yet.
            killed.append(name)
        self.kills.update(killed)
        return killed
