"""Requests that are too large to be scanned along with their jobs: in the store, and a document here that says where.

    {_id: job id, artifact: digest}      the request is an artifact (claim_check)
    {_id: job id, request: bytes}        it is here: the store was away, or an older version wrote it

A payload is written before its job, so an acknowledged job always has one. It goes when its job has ended in a way that
nobody looks into; what is left over by a crash in between, a sweep collects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Protocol

from bson import Binary
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, translated
from mesh.process.tasks import together
from services.ingest.clock import milliseconds
from services.ingest.documents import JOBS, PAYLOADS, RESTORES
from services.ingest.job import PAYLOAD_DROPPABLE, Job
from services.ingest.ulid import floor
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

SWEPT_AFTER = timedelta(hours=1)
"""Younger payloads without a job are left alone: a submit that is under way writes its payload first."""
_SWEPT_AT_ONCE = 500
_HANDED_IN_AT_ONCE = 8
# Each is a file that is synced: more at once only wait for the disk.


class Store(Protocol):
    """The store, as payloads need it."""

    async def hand_in(self, job_id: str, tenant: str, request: bytes) -> str | None:
        """Stores a job's request, durably, and gives its digest. None: the store does not take it now."""

    async def fetch(self, job_id: str, sha256: str) -> bytes:
        """A job's request. Raises DataLoss when it is damaged, another ShoalError when the store is away."""

    async def release(self, job_ids: Sequence[str]) -> None:
        """These jobs need their requests no more. Raises ShoalError."""

    def handed_in(self, before: str) -> AsyncIterator[list[str]]:
        """The ids of jobs below `before` whose requests are referred to, some at a time. Raises ShoalError."""


class Payloads:
    """Keeps payloads."""

    def __init__(self, database: AsyncDatabase[Document], store: Store) -> None:
        self._store = store
        self._jobs = database[JOBS]
        self._payloads = database[PAYLOADS]
        self._restores = database[RESTORES]

    async def put(self, jobs: Sequence[Job]) -> None:
        """Makes the payloads of those among `jobs` durable whose requests are kept apart.

        Raises:
            ShoalError: some may not be; what is there is collected later.
        """
        slots = asyncio.Semaphore(_HANDED_IN_AT_ONCE)
        payloads = await together(self._payload(job, slots) for job in jobs if job.is_apart)
        if payloads:
            with translated("storing the payloads of submitted jobs"):
                await self._payloads.insert_many(payloads, ordered=False)

    async def get(self, job_id: str) -> bytes | None:
        """A job's request; None when it is not there.

        Raises:
            DataLoss: it is damaged. ShoalError: it cannot be read now.
        """
        with translated("reading the payload of a job"):
            document = await self._payloads.find_one({"_id": job_id})
        if document is None:
            return None
        if "artifact" in document:
            return await self._store.fetch(job_id, document["artifact"])
        return bytes(document["request"])

    async def drop(self, job_ids: Sequence[str]) -> None:
        """Deletes payloads. Never fails: what it leaves, the sweep collects."""
        if job_ids:
            with suppress(ShoalError), translated("dropping payloads"):
                some = {"_id": {"$in": list(job_ids)}}
                handed_in = [
                    document["_id"]
                    async for document in self._payloads.find({**some, "artifact": {"$exists": True}}, {"_id": 1})
                ]
                await self._payloads.delete_many(some)
                await self._store.release(handed_in)

    async def sweep(self, now: datetime) -> int:
        """Deletes old payloads that no job needs, and says how many: of submits and deletions that broke off."""
        with translated("looking for a restore"):
            if await self._restores.find_one({}, {"_id": 1}) is not None:
                return 0  # Their jobs are yet to come.
        oldest = floor(milliseconds(now - SWEPT_AFTER))
        return await self._sweep_documents(oldest) + await self._sweep_references(oldest)

    async def _payload(self, job: Job, slots: asyncio.Semaphore) -> Document:
        request = job.request or b""
        async with slots:
            artifact = await self._store.hand_in(job.id, job.tenant, request)
        return {"_id": job.id, **({"request": Binary(request)} if artifact is None else {"artifact": artifact})}

    async def _sweep_references(self, oldest: str) -> int:
        """Releases what was handed in to the store, of payloads that were never written or are gone."""
        swept = 0
        async for ids in self._store.handed_in(oldest):
            with translated("looking for payloads"):
                cursor = self._payloads.find({"_id": {"$in": ids}}, {"_id": 1})
                known = {document["_id"] async for document in cursor}
            left = [job_id for job_id in ids if job_id not in known]
            await self._store.release(left)
            swept += len(left)
        return swept

    async def _sweep_documents(self, oldest: str) -> int:
        after, swept = "", 0
        while True:
            with translated("looking for payloads"):
                span = {"_id": {"$gt": after, "$lt": oldest}}
                cursor = self._payloads.find(span, {"_id": 1}).sort("_id", 1).limit(_SWEPT_AT_ONCE)
                ids = [document["_id"] async for document in cursor]
            if not ids:
                return swept
            unneeded = await self._unneeded(ids)
            await self.drop(unneeded)
            swept += len(unneeded)
            after = ids[-1]

    async def _unneeded(self, ids: Sequence[str]) -> list[str]:
        with translated("looking for the jobs of payloads"):
            needed_by = {"$or": [{"state": {"$nin": sorted(map(str, PAYLOAD_DROPPABLE))}}, {"is_kept": True}]}
            cursor = self._jobs.find({"_id": {"$in": list(ids)}, **needed_by}, {"_id": 1})
            needed = {document["_id"] async for document in cursor}
        return [job_id for job_id in ids if job_id not in needed]
