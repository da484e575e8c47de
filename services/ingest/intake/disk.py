"""Check of MongoDB's disk: submits are rejected while there is still space for the accepted jobs to end.

    free ──below the reserve──> rejected ──above 5/4 of the reserve──> accepted again

A mongod with a full disk terminates, and all its clients fail with it. The check reads the primary's disk.
"""

from __future__ import annotations

import asyncio
import logging

from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever
from shoal.errors import ResourceExhausted

log = logging.getLogger(__name__)

READ_S = 2.0
"""Interval of the check, a command of about a millisecond. Between checks the fastest intake writes some tens of MB."""
_AGAIN = 1.25
_MIB = 1 << 20


class Disk(Background):
    """Periodic check that `reserve` bytes are free on MongoDB's disk; 0: no check. Used as `async with`."""

    def __init__(self, database: AsyncDatabase[Document], reserve: int, *, read_s: float = READ_S) -> None:
        self._database = database
        self.reserve = reserve
        self.free = -1
        """Free bytes at the last check; -1: unknown."""
        self._read_s = read_s
        self._is_short = False
        self._is_open = asyncio.Event()

    def open(self) -> None:
        """Begin the checks: MongoDB is available."""
        self._is_open.set()

    def admit(self) -> None:
        """Return when one more job may be accepted.

        Raises:
            ResourceExhausted: the disk is nearly full.
        """
        if self._is_short:
            raise ResourceExhausted(
                f"MongoDB's disk has {self.free // _MIB} MiB left, and {self.reserve // _MIB} MiB are reserved for "
                "queued jobs: free some space there",
                retry_after_ms=int(self._read_s * 1000),
            )

    def observe(self, free: int) -> None:
        """Apply a measurement of the free bytes."""
        was_short = self._is_short
        self.free = free
        self._is_short = free < self.reserve * (_AGAIN if was_short else 1)
        if self._is_short and not was_short:
            log.error(
                "MongoDB's disk has %(free_mib)d MiB left: submits are rejected until there is more",
                {"event": "disk.full", "free_mib": free // _MIB},
            )
        if was_short and not self._is_short:
            log.warning(
                "MongoDB's disk has %(free_mib)d MiB again: submits are accepted",
                {"event": "disk.has_room_again", "free_mib": free // _MIB},
            )

    async def _run(self) -> None:
        await self._is_open.wait()
        if self.reserve:
            await for_ever("check MongoDB's disk", self._read, away_s=self._read_s, log=log, level=logging.INFO)

    async def _read(self) -> float:
        with translated("checking MongoDB's disk"):
            stats = await self._database.command("dbStats")
        # 0 for a database that does not exist yet.
        if stats.get("fsTotalSize"):
            self.observe(int(stats["fsTotalSize"] - stats["fsUsedSize"]))
        return self._read_s
