"""One export in a place at a time: two would replace one another's parts.

    enter ──document of the place: none, lapsed, or of this export──> renewed now and then ──> leave
                                └──of another──> FailedPrecondition

Times are MongoDB's, so that the clocks of two stores need not agree. A call that goes on with an export takes over from
the call before it, which may not have noticed yet that nobody listens.
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

_KEPT_S = 60.0
# So long a place stays taken when the store that writes there is killed.
_RENEWED_EVERY_S = 15.0
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Claim(Background):
    """Holds the place `where` for `export` while the `async with` block lasts.

    Args:
        where: the place's name, the same for all who may mean it.
        export: the export's own id.
        clock: monotonic, in seconds.

    Raises (on entering):
        FailedPrecondition: another export is under way there.
        Unavailable: MongoDB is away.
    """

    def __init__(
        self, collections: Collections, where: str, export: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._collections = collections
        self._where = where
        self._export = export
        self._call = uuid.uuid4().hex
        self._clock = clock
        self._lapses_at = clock()

    async def __aenter__(self) -> Self:
        lapses_at = self._clock() + _KEPT_S
        with translated("claiming the place of an export"):
            try:
                held = await self._take()
            except DuplicateKeyError:  # Both found no document; now there is one.
                held = await self._take()
        if held["call"] != self._call:
            raise FailedPrecondition(
                f"url: another export to {brief(self._where)} is under way: choose another place, or wait for its end "
                f"(if its store was killed, {_KEPT_S:.0f} s)"
            )
        self._lapses_at = lapses_at
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, err, tb)
        # It may be that a later call of this export has taken over, or that MongoDB is away.
        with suppress(ShoalError), translated("leaving the place of an export"):
            await self._collections.exports.delete_one({"_id": self._where, "call": self._call})

    def check(self) -> None:
        """Raises Aborted when the place may be another's: this process, or MongoDB, stood still for too long."""
        if self._clock() >= self._lapses_at:
            raise Aborted(
                f"the export stood still for {_KEPT_S:.0f} s, and may have lost its place: go on with its cursor"
            )

    async def _take(self) -> Document:
        """The place's document: with this call in it, if it was free."""
        is_free: Document = {
            "$or": [
                {"$lt": [{"$ifNull": ["$expires_at", _LONG_AGO]}, "$$NOW"]},
                {"$eq": ["$export", self._export]},
            ]
        }

        def if_free(field: str, value: Any) -> Document:
            return {field: {"$cond": [is_free, value, f"${field}"]}}

        taken = if_free("export", self._export) | if_free("call", self._call) | if_free("expires_at", _until())
        found = await self._collections.exports.find_one_and_update(
            {"_id": self._where}, [{"$set": taken}], upsert=True, return_document=ReturnDocument.AFTER
        )
        assert found is not None
        return found

    async def _run(self) -> None:
        mine = {"_id": self._where, "export": self._export}
        while True:
            await asyncio.sleep(_RENEWED_EVERY_S)
            lapses_at = self._clock() + _KEPT_S
            try:
                with translated("keeping the place of an export"):
                    renewed = await self._collections.exports.update_one(mine, [{"$set": {"expires_at": _until()}}])
            except ShoalError as err:
                log.info("%s", err)
                continue
            if renewed.matched_count:
                self._lapses_at = lapses_at


def _until() -> Document:
    return {"$add": ["$$NOW", round(_KEPT_S * 1_000)]}
