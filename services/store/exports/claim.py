"""Claim of an export on its location: two exports at one location would replace each other's parts.

    enter ──document of the location: none, expired, or of this export──> renewed periodically ──> leave
                                   └──of another export──> FailedPrecondition

Times are MongoDB's, so the clocks of two stores need not agree. A call that resumes an export takes the claim over from
the earlier call, which may not have noticed yet that its client has disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from mesh.process.tasks import Background
from services.store.artifacts.digest import brief
from services.store.documents import Collections
from shoal.errors import Aborted, FailedPrecondition, ShoalError

log = logging.getLogger(__name__)

# A location stays claimed this long when the store that writes there is killed.
_KEPT_S = 60.0
_RENEWED_EVERY_S = 15.0
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Claim(Background):
    """Claims `location` for `export` while the `async with` block lasts.

    Args:
        location: the location's name, the same for all URLs that lead there.
        export: the export's own id.
        clock: monotonic, in seconds.

    Raises (on entering):
        FailedPrecondition: another export is running there.
        Unavailable: MongoDB is unavailable.
    """

    def __init__(
        self, collections: Collections, location: str, export: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._collections = collections
        self._location = location
        self._export = export
        self._call = uuid.uuid4().hex
        self._clock = clock
        self._expires_at = clock()

    async def __aenter__(self) -> Self:
        expires_at = self._clock() + _KEPT_S
        with translated("claiming the location of an export"):
            try:
                held = await self._acquire()
            except DuplicateKeyError:
                # Two calls found no document; now there is one.
                held = await self._acquire()
        if held["call"] != self._call:
            raise FailedPrecondition(
                f"url: another export to {brief(self._location)} is running: choose another location, or wait for its "
                f"end ({_KEPT_S:.0f} s if its store was killed)"
            )
        self._expires_at = expires_at
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, err, tb)
        # A later call of this export may have taken over, or MongoDB may be unavailable.
        with suppress(ShoalError), translated("releasing the location of an export"):
            await self._collections.exports.delete_one({"_id": self._location, "call": self._call})

    def check(self) -> None:
        """Raise Aborted when the claim may have expired: this process or MongoDB stalled for too long."""
        if self._clock() >= self._expires_at:
            raise Aborted(
                f"the export stalled for {_KEPT_S:.0f} s and may have lost its location: resume it with its cursor"
            )

    async def _acquire(self) -> Document:
        """Claim the location if it is free. Return its document."""
        is_free: Document = {
            "$or": [
                {"$lt": [{"$ifNull": ["$expires_at", _LONG_AGO]}, "$$NOW"]},
                {"$eq": ["$export", self._export]},
            ]
        }

        def if_free(field: str, value: Any) -> Document:
            return {field: {"$cond": [is_free, value, f"${field}"]}}

        claimed = if_free("export", self._export) | if_free("call", self._call) | if_free("expires_at", _until())
        found = await self._collections.exports.find_one_and_update(
            {"_id": self._location}, [{"$set": claimed}], upsert=True, return_document=ReturnDocument.AFTER
        )
        assert found is not None
        return found

    async def _run(self) -> None:
        claim = {"_id": self._location, "export": self._export}
        while True:
            await asyncio.sleep(_RENEWED_EVERY_S)
            expires_at = self._clock() + _KEPT_S
            try:
                with translated("renewing the claim of an export"):
                    renewed = await self._collections.exports.update_one(claim, [{"$set": {"expires_at": _until()}}])
            except ShoalError as err:
                log.info("%(error)s", {"event": "export.claim_not_renewed", "error": err})
                continue
            if renewed.matched_count:
                self._expires_at = expires_at


def _until() -> Document:
    return {"$add": ["$$NOW", round(_KEPT_S * 1_000)]}
