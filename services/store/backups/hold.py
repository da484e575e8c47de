"""While a backup is made, no blob is removed: what its documents mean is there until it has been copied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from mesh.mongo import translated
from mesh.process.tasks import Background
from services.store.documents import Collections
from shoal.errors import Aborted, ShoalError

_KEPT = timedelta(minutes=10)
# A backup whose process died keeps blobs so long.
_RENEWED_EVERY_S = 30.0


class Hold(Background):
    """Holds for as long as the `async with` block lasts."""

    def __init__(self, collections: Collections, name: str, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._name = name
        self._clock = clock
        self._expires_at = clock()

    async def begin(self) -> None:
        """Durable when it returns: whatever is read from MongoDB after it, its blobs stay."""
        self._expires_at = self._clock() + _KEPT
        with translated("beginning a backup"):
            await self._collections.holds.insert_one({"_id": self._name, "expires_at": self._expires_at})

    async def end(self) -> None:
        """Blobs may go again."""
        with translated("ending a backup"):
            await self._collections.holds.delete_one({"_id": self._name})

    def check(self) -> None:
        """Raises Aborted when it may not have held all the time: this process, or MongoDB, stood still for too long."""
        if self._clock() >= self._expires_at:
            raise Aborted("the backup stood still for too long, and blobs may be gone that it needs: start it again")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_RENEWED_EVERY_S)
            now = self._clock()
            held = {"_id": self._name, "expires_at": {"$gt": now}}
            try:
                with translated("holding blobs for a backup"):
                    renewed = await self._collections.holds.update_one(held, {"$set": {"expires_at": now + _KEPT}})
            except ShoalError:
                continue
            if renewed.matched_count:
                self._expires_at = now + _KEPT
