"""Schedules in MongoDB: created, read, paused and removed by clients."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock
from mesh.process.tasks import uninterrupted
from mesh.rpc.places import are_for_others
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.ingest.schedules.documents import document_of, id_of, schedule_of
from services.ingest.schedules.schedule import Schedule
from shoal.errors import Aborted, AlreadyExists, NotFound, ResourceExhausted

MOST = 10_000
"""Maximum number of schedules: one leader fires all of them."""
CALLS_AT_ONCE = 6
"""Reads and changes of single schedules that one instance serves at a time."""
_LIGHT = {"template": 0}
_LEADER_FIELDS = ("last_at", "last_job", "last_skip", "fired", "skipped")


class ScheduleRepository:
    """Storage of schedules."""

    def __init__(self, schedules: AsyncCollection[Document], clock: Clock) -> None:
        self._schedules = schedules
        self._clock = clock
        self._turns = TenantTurns(CALLS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)

    def now(self) -> datetime:
        """Return the current time."""
        return self._clock()

    async def put(self, requested: Schedule, *, replaces: bool) -> Schedule:
        """Create a schedule, or (with `replaces`) change the one of the same name, which keeps its history.

        Raises:
            AlreadyExists: the schedule exists, and `replaces` is False. ResourceExhausted: too many schedules.
            Aborted: it was changed concurrently. Unavailable: MongoDB is unavailable.
        """
        async with self._turns.take(requested.tenant):
            return await uninterrupted(self._put(requested, replaces=replaces))

    async def _put(self, requested: Schedule, *, replaces: bool) -> Schedule:
        with translated("storing a schedule"):
            before = await self._schedules.find_one({"_id": id_of(requested.tenant, requested.name)})
            if before is None:
                return await self._make(requested)
            if not replaces:
                raise AlreadyExists(f"schedule {requested.name!r} exists already: replace it, or choose another name")
            return await self._change(schedule_of(before), requested)

    async def get(self, tenant: str, name: str) -> Schedule:
        """Return a schedule.

        Raises:
            NotFound: no such schedule. Unavailable: MongoDB is unavailable.
        """
        async with self._turns.take(tenant):
            return await uninterrupted(self._get(tenant, name))

    async def _get(self, tenant: str, name: str) -> Schedule:
        with translated("reading a schedule"):
            document = await self._schedules.find_one({"_id": id_of(tenant, name)})
        return schedule_of(_found(document, name))

    async def list(self, tenant: str | None) -> list[Schedule]:
        """Return the schedules of one tenant (None: of all), without their templates, by tenant and name.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("listing schedules"):
            query = {} if tenant is None else {"tenant": tenant}
            return [schedule_of(document) async for document in self._schedules.find(query, _LIGHT).sort("_id", 1)]

    async def pause(self, tenant: str, name: str, paused: bool) -> Schedule:
        """Pause a schedule, or resume it from now: the times in between are skipped.

        Raises:
            NotFound: no such schedule. Aborted: it was changed concurrently. Unavailable: MongoDB is unavailable.
        """
        async with self._turns.take(tenant):
            return await uninterrupted(self._pause(tenant, name, paused))

    async def _pause(self, tenant: str, name: str, paused: bool) -> Schedule:
        before = await self._get(tenant, name)
        if before.is_paused == paused:
            return before
        now = self._clock()
        return await self._change(before, replace(before, is_paused=paused, next_at=before.next_after(now)))

    async def remove(self, tenant: str, name: str) -> Schedule:
        """Remove a schedule, and return it. Its jobs stay.

        Raises:
            NotFound: no such schedule. Unavailable: MongoDB is unavailable.
        """
        async with self._turns.take(tenant):
            with translated("removing a schedule"):
                removing = self._schedules.find_one_and_delete({"_id": id_of(tenant, name)})
                document = await uninterrupted(removing)
        return schedule_of(_found(document, name))

    async def _make(self, requested: Schedule) -> Schedule:
        free = MOST - await self._schedules.estimated_document_count()
        if free <= 0:
            raise ResourceExhausted(f"there are {MOST} schedules, which is the limit: remove some")
        tenant = requested.tenant
        if tenant and are_for_others(held := await self._schedules.count_documents({"tenant": tenant}), free):
            raise ResourceExhausted(
                f"tenant {tenant!r} has {held} schedules, and the {free} that may be added are for others: remove some"
            )
        try:
            await self._schedules.insert_one(document_of(requested))
        except DuplicateKeyError:
            raise Aborted(f"schedule {requested.name!r} was created concurrently: try again") from None
        return requested

    async def _change(self, before: Schedule, requested: Schedule) -> Schedule:
        """Write `requested` over `before`, except for the leader's fields, so that neither overwrites the other."""
        after = replace(
            requested,
            created_at=before.created_at,
            updated_at=self._clock(),
            revision=before.revision + 1,
            next_at=None if requested.is_paused else requested.next_at,
        )
        document = document_of(after)
        fields = {name: value for name, value in document.items() if name not in (*_LEADER_FIELDS, "_id", "fence")}
        # The change may have repaired what its firing failed of.
        update: Document = {"$set": fields, "$unset": {"try_again_at": "", "tries": ""}}
        for name in ("next_at", "caller"):
            if name not in document:
                update["$unset"][name] = ""
        with translated("changing a schedule"):
            written = await self._schedules.find_one_and_update(
                {"_id": document["_id"], "revision": before.revision}, update, return_document=ReturnDocument.AFTER
            )
        if written is None:
            raise Aborted(f"schedule {before.name!r} was changed or removed concurrently: read it, and try again")
        return schedule_of(written)


def _found(document: Document | None, name: str) -> Document:
    if document is None:
        raise NotFound(f"there is no schedule {name[:64]!r} of this tenant")
    return document
