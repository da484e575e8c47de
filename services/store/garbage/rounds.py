"""The rounds of the collector: when they are, for as long as the service runs."""

from __future__ import annotations

import asyncio
import logging
import random

from mesh.process.tasks import Background
from services.store.garbage.collector import Collected, Collector
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

STRAYS_EVERY = 144
"""With rounds of 10 minutes: once a day. Each lists every blob."""
_FIRST_STRAYS = 6


class Rounds(Background):
    """Has the collector make its rounds. Every instance does: what two do at once, one of them does."""

    def __init__(self, collector: Collector, every_s: float) -> None:
        self._collector = collector
        self._every_s = every_s

    async def _run(self) -> None:
        number = 0
        while True:
            # Not in step with other instances, which may have started together with this one.
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1))
            number += 1
            await self._round(strays=number % STRAYS_EVERY == _FIRST_STRAYS)

    async def _round(self, *, strays: bool) -> None:
        try:
            done = await self._collector.collect(strays=strays)
        except ShoalError as err:
            log.warning("artifacts could not be collected for now: %s", err)
        except Exception:
            log.exception("collecting artifacts")  # A fault of ours must not end the rounds.
        else:
            if done != Collected():
                log.info("collected: %s", done)
