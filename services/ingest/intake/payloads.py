"""Payloads: requests that are too large for their jobs' documents. The store has the request; a document refers to it.

    {_id: job id, artifact: digest}      the request is an artifact in the store (claim_check.py)
    {_id: job id, request: bytes}        the store was unavailable, or an older version wrote the request here

A payload is written before its job, so an acknowledged job always has its payload. It is removed when its job ends
without needing it any more. A sweep removes the remains of crashes in between.
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
from mesh.mongo_clock import milliseconds
from mesh.process.tasks import together
from services.ingest.documents import JOBS, PAYLOADS, RESTORES
from services.ingest.job import PAYLOAD_DROPPABLE, Job
from services.ingest.ulid import floor
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

SWEPT_AFTER = timedelta(hours=1)
"""Minimum age of payloads that the sweep removes: a submit in progress has written its payload and not yet its job."""
_SWEPT_AT_ONCE = 500
# Each upload syncs a file: more concurrent uploads only wait for the disk.
_CONCURRENT_UPLOADS = 8


class PayloadStore(Protocol):
    """Requests in the store."""

    async def upload(self, job_id: str, tenant: str, request: bytes) -> str | None:
        """Store a job's request durably, and return its digest; None when the store is unavailable."""

    async def fetch(self, job_id: str, sha256: str) -> bytes:
        """Return a job's request. Raises DataLoss when it is damaged, another ShoalError without the store."""

    async def release(self, job_ids: Sequence[str]) -> None:
        """Release the requests of these jobs. Raises ShoalError."""

    def list_uploaded(self, before: str) -> AsyncIterator[list[str]]:
        """Yield the ids below `before` of jobs with uploaded requests, some at a time. Raises ShoalError."""


class Payloads:
    """Storage of payloads."""

    def __init__(self, database: AsyncDatabase[Document], store: PayloadStore) -> None:
        self._store = store
        self._jobs = database[JOBS]
        self._payloads = database[PAYLOADS]
        self._restores = database[RESTORES]

    async def put(self, jobs: Sequence[Job]) -> None:
        """Store the payloads of the jobs among `jobs` that have one (`is_apart`), durably.

        Raises:
            ShoalError: some payloads may not be stored; the sweep removes the others.
        """
        slots = asyncio.Semaphore(_CONCURRENT_UPLOADS)
        payloads = await together(self._payload(job, slots) for job in jobs if job.is_apart)
        if payloads:
            with translated("storing the payloads of submitted jobs"):
                await self._payloads.insert_many(payloads, ordered=False)

    async def get(self, job_id: str) -> bytes | None:
        """Return a job's request; None when there is none.

        Raises:
            DataLoss: the request is damaged. ShoalError: MongoDB or the store is unavailable.
        """
        with translated("reading the payload of a job"):
            document = await self._payloads.find_one({"_id": job_id})
        if document is None:
            return None
        if "artifact" in document:
            return await self._store.fetch(job_id, document["artifact"])
        return bytes(document["request"])

    async def drop(self, job_ids: Sequence[str]) -> None:
        """Delete payloads. Never fails: the sweep deletes the rest."""
        if job_ids:
            with suppress(ShoalError), translated("dropping payloads"):
                some = {"_id": {"$in": list(job_ids)}}
                uploaded = [
                    document["_id"]
                    async for document in self._payloads.find({**some, "artifact": {"$exists": True}}, {"_id": 1})
                ]
                await self._payloads.delete_many(some)
                await self._store.release(uploaded)

    async def sweep(self, now: datetime) -> int:
        """Delete old payloads that no job needs, of interrupted submits and deletions; return their number."""
        with translated("checking for a restore in progress"):
            # A restore writes the jobs after their payloads.
            if await self._restores.find_one({}, {"_id": 1}) is not None:
                return 0
        oldest = floor(milliseconds(now - SWEPT_AFTER))
        return await self._sweep_documents(oldest) + await self._sweep_references(oldest)

    async def _payload(self, job: Job, slots: asyncio.Semaphore) -> Document:
        request = job.request or b""
        async with slots:
            artifact = await self._store.upload(job.id, job.tenant, request)
        return {"_id": job.id, **({"request": Binary(request)} if artifact is None else {"artifact": artifact})}

    async def _sweep_references(self, oldest: str) -> int:
        """Release requests in the store without a payload document: interrupted before it was written, or deleted."""
        swept = 0
        async for ids in self._store.list_uploaded(oldest):
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
        with translated("finding the jobs of payloads"):
            needed_by = {"$or": [{"state": {"$nin": sorted(map(str, PAYLOAD_DROPPABLE))}}, {"is_kept": True}]}
            cursor = self._jobs.find({"_id": {"$in": list(ids)}, **needed_by}, {"_id": 1})
            needed = {document["_id"] async for document in cursor}
        return [job_id for job_id in ids if job_id not in needed]
