"""Periodic runs of the garbage collector while the service runs."""

from __future__ import annotations

import asyncio
import logging
import random

from mesh.process.tasks import Background
from services.store.garbage.collector import Collected, Collector
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

STRAYS_EVERY = 144
"""Rounds between two searches for strays: once a day with rounds of 10 minutes. Each search lists every blob."""
_FIRST_STRAYS = 6


class CollectorRounds(Background):
    """Runs the collector periodically. Every instance does; simultaneous runs share the work safely."""

    def __init__(self, collector: Collector, every_s: float) -> None:
        self._collector = collector
        self._every_s = every_s

    async def _run(self) -> None:
        number = 0
        while True:
            # A random interval: instances that started together should not run in step.
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1))
            number += 1
            await self._round(strays=number % STRAYS_EVERY == _FIRST_STRAYS)

    async def _round(self, *, strays: bool) -> None:
        try:
            done = await self._collector.collect(strays=strays)
        except ShoalError as err:
            log.warning(
                "artifacts could not be collected for now: %(error)s", {"event": "garbage.retrying", "error": err}
            )
        except Exception:
            # A bug in one round must not end the later ones.
            log.exception("collecting artifacts", {"event": "garbage.failed"})
        else:
            if done != Collected():
                log.info("collected: %(collected)s", {"event": "garbage.collected", "collected": done})
