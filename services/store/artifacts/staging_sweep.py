"""Periodic removal of unfinished uploads that are too old."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from mesh.process.tasks import Background, for_ever
from mesh.process.threads import Threads
from services.store.artifacts.staging import Staging

log = logging.getLogger(__name__)

_SWEEP_S = 600.0


class StagingSweep(Background):
    """Sweeps the staging folder at the start and every ten minutes, while an `async with` block runs."""

    def __init__(self, staging: Staging, threads: Threads, clock: Callable[[], datetime]) -> None:
        self._staging = staging
        self._threads = threads
        self._clock = clock
        self._every_s = min(_SWEEP_S, staging.max_age_s)

    async def _run(self) -> None:
        await for_ever("sweep unfinished uploads", self._sweep, away_s=self._every_s, log=log)

    async def _sweep(self) -> float:
        await self._threads.run(self._staging.sweep, self._clock().timestamp())
        return self._every_s
