"""Hold: no blob is removed during a backup, so every referenced blob exists until it has been copied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from mesh.mongo import translated
from mesh.process.tasks import Background
from services.store.documents import Collections
from shoal.errors import Aborted, ShoalError

# A backup whose process died keeps blobs this long.
_KEPT = timedelta(minutes=10)
_RENEWED_EVERY_S = 30.0


class Hold(Background):
    """Forbids the removal of blobs while the `async with` block runs. Call `begin` before it, and `end` after it."""

    def __init__(self, collections: Collections, name: str, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._name = name
        self._clock = clock
        self._expires_at = clock()

    async def begin(self) -> None:
        """Begin the hold, durably: blobs of documents that are read from MongoDB afterwards are not removed."""
        self._expires_at = self._clock() + _KEPT
        with translated("beginning a backup"):
            await self._collections.holds.insert_one({"_id": self._name, "expires_at": self._expires_at})

    async def end(self) -> None:
        """End the hold."""
        with translated("ending a backup"):
            await self._collections.holds.delete_one({"_id": self._name})

    def check(self) -> None:
        """Raise Aborted when the hold may have lapsed: this process or MongoDB stalled for too long."""
        if self._clock() >= self._expires_at:
            raise Aborted("the backup stalled for too long, and blobs that it needs may be removed: start it again")

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
