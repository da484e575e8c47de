"""The schedules that there are: put, read, paused and removed by clients."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from services.ingest.clock import Clock
from services.ingest.schedules.documents import document_of, id_of, schedule_of
from services.ingest.schedules.schedule import Schedule
from shoal.errors import Aborted, AlreadyExists, NotFound, ResourceExhausted

MOST = 10_000
"""Schedules in all: each that is due takes its turn with one leader."""
_LIGHT = {"template": 0}
_LEADER_FIELDS = ("last_at", "last_job", "last_skip", "fired", "skipped")


class ScheduleRepository:
    """Keeps schedules."""

    def __init__(self, schedules: AsyncCollection[Document], clock: Clock) -> None:
        self._schedules = schedules
        self._clock = clock

    def now(self) -> datetime:
        """The time."""
        return self._clock()

    async def put(self, requested: Schedule, *, replaces: bool) -> Schedule:
        """Makes a schedule, or (when `replaces`) changes the one of its name, which keeps its history.

        Raises:
            AlreadyExists: there is one, and `replaces` is False. ResourceExhausted: too many. Aborted: it was changed
            at the same time. Unavailable: MongoDB is away.
        """
        with translated("storing a schedule"):
            before = await self._schedules.find_one({"_id": id_of(requested.tenant, requested.name)})
            if before is None:
                return await self._make(requested)
            if not replaces:
                raise AlreadyExists(
                    f"there is a schedule {requested.name!r} already: change it, or choose another name"
                )
            return await self._change(schedule_of(before), requested)

    async def get(self, tenant: str, name: str) -> Schedule:
        """One schedule.

        Raises:
            NotFound: there is none. Unavailable: MongoDB is away.
        """
        with translated("reading a schedule"):
            document = await self._schedules.find_one({"_id": id_of(tenant, name)})
        return schedule_of(_found(document, name))

    async def list(self, tenant: str | None) -> list[Schedule]:
        """All schedules (of one tenant), without their templates, by tenant and name.

        Raises:
            Unavailable: MongoDB is away.
        """
        with translated("listing schedules"):
            query = {} if tenant is None else {"tenant": tenant}
            return [schedule_of(document) async for document in self._schedules.find(query, _LIGHT).sort("_id", 1)]

    async def pause(self, tenant: str, name: str, paused: bool) -> Schedule:
        """Pauses a schedule, or has it go on from now: times in between are skipped.

        Raises:
            NotFound: there is none. Aborted: it was changed at the same time. Unavailable: MongoDB is away.
        """
        before = await self.get(tenant, name)
        if before.is_paused == paused:
            return before
        now = self._clock()
        return await self._change(before, replace(before, is_paused=paused, next_at=before.next_after(now)))

    async def remove(self, tenant: str, name: str) -> Schedule:
        """Removes a schedule. Jobs that it has made stay.

        Raises:
            NotFound: there is none. Unavailable: MongoDB is away.
        """
        with translated("removing a schedule"):
            document = await self._schedules.find_one_and_delete({"_id": id_of(tenant, name)})
        return schedule_of(_found(document, name))

    async def _make(self, requested: Schedule) -> Schedule:
        if await self._schedules.estimated_document_count() >= MOST:
            raise ResourceExhausted(f"there are {MOST} schedules, the most there may be: remove some")
        try:
            await self._schedules.insert_one(document_of(requested))
        except DuplicateKeyError:
            raise Aborted(f"schedule {requested.name!r} was made at the same time: try again") from None
        return requested

    async def _change(self, before: Schedule, requested: Schedule) -> Schedule:
        """Writes `wanted` over `before`. What the leader writes is left alone, so the two do not disturb each other."""
        after = replace(
            requested,
            created_at=before.created_at,
            updated_at=self._clock(),
            revision=before.revision + 1,
            next_at=None if requested.is_paused else requested.next_at,
        )
        document = document_of(after)
        fields = {name: value for name, value in document.items() if name not in (*_LEADER_FIELDS, "_id", "fence")}
        update: Document = {"$set": fields}
        if after.next_at is None:
            update["$unset"] = {"next_at": ""}
        with translated("changing a schedule"):
            written = await self._schedules.find_one_and_update(
                {"_id": document["_id"], "revision": before.revision}, update, return_document=ReturnDocument.AFTER
            )
        if written is None:
            raise Aborted(f"schedule {before.name!r} was changed or removed at the same time: read it, and try again")
        return schedule_of(written)


def _found(document: Document | None, name: str) -> Document:
    if document is None:
        raise NotFound(f"there is no schedule {name[:64]!r} of this tenant")
    return document
