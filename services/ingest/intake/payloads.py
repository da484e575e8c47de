"""Requests that are too large to be scanned along with their jobs: one document each, in a collection of their own.

A payload is written before its job, so an acknowledged job always has one. It goes when its job has ended in a way that
nobody looks into; what is left over by a crash in between, a sweep collects.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from bson import Binary
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, translated
from services.ingest.clock import milliseconds
from services.ingest.documents import JOBS, PAYLOADS
from services.ingest.job import Job, State
from services.ingest.ulid import floor
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

SWEPT_AFTER = timedelta(hours=1)
"""Younger payloads without a job are left alone: a submit that is under way writes its payload first."""
_SWEPT_AT_ONCE = 500


class Payloads:
    """Keeps payloads."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._jobs = database[JOBS]
        self._payloads = database[PAYLOADS]

    async def put(self, jobs: Sequence[Job]) -> None:
        """Makes the payloads of those among `jobs` durable whose requests are kept apart.

        Raises:
            ShoalError: some may not be; what is there is collected later.
        """
        payloads = [{"_id": job.id, "request": Binary(job.request or b"")} for job in jobs if job.is_apart]
        if payloads:
            with translated("storing the payloads of submitted jobs"):
                await self._payloads.insert_many(payloads, ordered=False)

    async def get(self, job_id: str) -> bytes | None:
        """A job's request; None when it is not there."""
        with translated("reading the payload of a job"):
            document = await self._payloads.find_one({"_id": job_id})
        return None if document is None else bytes(document["request"])

    async def drop(self, job_ids: Sequence[str]) -> None:
        """Deletes payloads. Never fails: what it leaves, the sweep collects."""
        if job_ids:
            with suppress(ShoalError), translated("dropping payloads"):
                await self._payloads.delete_many({"_id": {"$in": list(job_ids)}})

    async def sweep(self, now: datetime) -> int:
        """Deletes old payloads that no job needs, and says how many: of submits and deletions that broke off."""
        oldest = floor(milliseconds(now - SWEPT_AFTER))
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
        over = [str(state) for state in (State.SUCCEEDED, State.CANCELLED, State.EXPIRED)]
        with translated("looking for the jobs of payloads"):
            needed_by = {"$or": [{"state": {"$nin": over}}, {"is_kept": True}]}
            cursor = self._jobs.find({"_id": {"$in": list(ids)}, **needed_by}, {"_id": 1})
            needed = {document["_id"] async for document in cursor}
        return [job_id for job_id in ids if job_id not in needed]
