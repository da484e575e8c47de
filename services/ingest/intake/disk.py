"""MongoDB's disk: submits are refused while there is still room for the jobs that were accepted to come to their ends.

    free ──below the reserve──> refused ──above 5/4 of it──> taken again

A mongod whose disk is full ends itself, and with it everything else that needs it. What is asked is the primary's disk.
"""

from __future__ import annotations

import asyncio
import logging

from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever
from shoal.errors import ResourceExhausted

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""A look is a command of about a millisecond. In this time the fastest intake measured writes some tens of MB."""
_AGAIN = 1.25
_MIB = 1 << 20


class Disk(Background):
    """Looks at the disk now and then. `reserve` bytes must be free; 0: whatever is free will do."""

    def __init__(self, database: AsyncDatabase[Document], reserve: int, *, look_s: float = LOOK_S) -> None:
        self._database = database
        self._reserve = reserve
        self._look_s = look_s
        self._is_short = False
        self._free = 0
        self._is_open = asyncio.Event()

    def open(self) -> None:
        """MongoDB can be asked from now on."""
        self._is_open.set()

    def admit(self) -> None:
        """Lets one more job in.

        Raises:
            ResourceExhausted: the disk is nearly full.
        """
        if self._is_short:
            raise ResourceExhausted(
                f"MongoDB's disk has {self._free // _MIB} MiB left, and {self._reserve // _MIB} MiB are kept for jobs "
                "that are queued: free some space there",
                retry_after_ms=int(self._look_s * 1000),
            )

    def seen(self, free: int) -> None:
        """So many bytes are free."""
        was_short = self._is_short
        self._free = free
        self._is_short = free < self._reserve * (_AGAIN if was_short else 1)
        if self._is_short and not was_short:
            log.error("MongoDB's disk has %d MiB left: submits are refused until there is more", free // _MIB)
        if was_short and not self._is_short:
            log.warning("MongoDB's disk has %d MiB again: submits are taken", free // _MIB)

    async def _run(self) -> None:
        await self._is_open.wait()
        if self._reserve:
            await for_ever("look at MongoDB's disk", self._look, away_s=self._look_s, log=log, level=logging.INFO)

    async def _look(self) -> float:
        with translated("looking at MongoDB's disk"):
            stats = await self._database.command("dbStats")
        if stats.get("fsTotalSize"):  # It is 0 for a database that is not there yet.
            self.seen(int(stats["fsTotalSize"] - stats["fsUsedSize"]))
        return self._look_s
