"""Waiting calls of GetResult: notified of results recorded here, and by a periodic query of those recorded elsewhere.

GetResult(wait) ─> waiters, by job <─┬─ results that were just recorded here, with their documents
                                     └─ one periodic query for all waiters: other instances record results too
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from mesh.mongo import Document, translated
from mesh.process.tasks import Background
from services.store.documents import Collections
from shoal.errors import ResourceExhausted, ShoalError, Unavailable

log = logging.getLogger(__name__)

MOST_WAIT_S = 5.0
"""Longest wait of a call: a shutdown need not wait for it, and a client that wants to wait longer calls again."""
# Waiting calls, bounded for memory; each is one small object.
_MOST = 10_000
_POLL_S = 0.1
# After a query, rest ten times as long: queries take at most a tenth of the time.
_REST = 10
_AWAY_S = 0.5
_QUERIED_AT_ONCE = 1_000
_FULL_MS = 1_000
_ULID_CHARS, _TIME_CHARS = 26, 10
_DIGITS = str.maketrans(
    "0123456789ABCDEFGHJKMNPQRSTVWXYZ", "0123456789abcdefghijklmnopqrstuv", "ILOUabcdefghijklmnopqrstuvwxyz"
)
_YOUNG_MS = 100


class Waiters(Background):
    """All calls that wait. Use as `async with`."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        # Each with the tenant that the result must have; None: any.
        self._futures: dict[str, dict[asyncio.Future[Document | None], str | None]] = {}
        self._count = 0
        self._has_waiters = asyncio.Event()
        self._is_stopping = False

    def begin(self, job_id: str, tenant: str | None = None) -> asyncio.Future[Document | None]:
        """Register a waiter. Its future gets the document once it is recorded here; None once recorded elsewhere.

        With `tenant`, results of other tenants do not end the wait. The caller then reads the database once, because
        the result may exist already, and finishes with `end`.

        Raises:
            ResourceExhausted: too many calls wait. Unavailable: this instance is shutting down.
        """
        if self._is_stopping:
            raise Unavailable("this instance is stopping: another one has the result")
        if self._count >= _MOST:
            raise ResourceExhausted(f"{_MOST} calls wait for results, the most allowed", retry_after_ms=_FULL_MS)
        future: asyncio.Future[Document | None] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(job_id, {})[future] = tenant
        self._count += 1
        self._has_waiters.set()
        return future

    def end(self, job_id: str, future: asyncio.Future[Document | None]) -> None:
        """Remove a waiter."""
        self._count -= 1
        future.cancel()
        if (futures := self._futures.get(job_id)) is not None:
            futures.pop(future, None)
            if not futures:
                del self._futures[job_id]

    @contextmanager
    def registered(self, job_id: str, tenant: str | None = None) -> Iterator[asyncio.Future[Document | None]]:
        """Register a waiter while the block lasts. Raises the errors of `begin`."""
        future = self.begin(job_id, tenant)
        try:
            yield future
        finally:
            self.end(job_id, future)

    async def wait(self, future: asyncio.Future[Document | None], wait_s: float) -> Document | None:
        """Return the result of a future from `begin`.

        Raises:
            TimeoutError: the time has passed. Unavailable: this instance is shutting down.
        """
        # asyncio.wait_for would wake the caller one loop iteration later.
        timer = asyncio.get_running_loop().call_later(wait_s, _late, future)
        try:
            return await future
        finally:
            timer.cancel()

    def notify(self, docs: Sequence[Document]) -> bool:
        """Notify the waiters of results that were just recorded here. Return True when any call waits."""
        if not self._futures:
            return False
        for doc in docs:
            self._resolve(doc["_id"], doc["tenant"], doc)
        return True

    def stop(self) -> None:
        """End all waits, so that clients call another instance."""
        self._is_stopping = True
        for futures in self._futures.values():
            for future in futures:
                if not future.done():
                    future.set_exception(Unavailable("this instance is stopping: call again"))

    def _resolve(self, job_id: str, owner: str | None, doc: Document | None) -> None:
        for future, tenant in self._futures.get(job_id, {}).items():
            if not future.done() and tenant in (None, owner):
                future.set_result(doc)

    async def _run(self) -> None:
        while True:
            await self._has_waiters.wait()
            await asyncio.sleep(_POLL_S)
            if not self._futures:
                self._has_waiters.clear()
                continue
            began = time.monotonic()
            try:
                await self._query(list(self._futures))
            except ShoalError as err:
                log.info(
                    "cannot query now for results recorded by other instances: %(error)s",
                    {"event": "results.query_retrying", "error": err},
                )
                await asyncio.sleep(_AWAY_S)
            await asyncio.sleep(_REST * (time.monotonic() - began))

    async def _query(self, job_ids: Sequence[str]) -> None:
        for first in range(0, len(job_ids), _QUERIED_AT_ONCE):
            some = list(job_ids[first : first + _QUERIED_AT_ONCE])
            with translated("querying for results recorded by other instances"):
                async for found in self._collections.results.find({"_id": {"$in": some}}, {"_id": 1, "tenant": 1}):
                    self._resolve(found["_id"], found.get("tenant"), None)


def is_young(job_id: str, now: datetime) -> bool:
    """Return True when a job was submitted just now, by its ULID (https://github.com/ulid/spec); else False."""
    try:
        made_ms = int(job_id[:_TIME_CHARS].translate(_DIGITS), 32) if len(job_id) == _ULID_CHARS else 0
    except ValueError:
        return False
    # abs(): ingest's clock may be ahead of this one.
    return abs(now.timestamp() * 1000 - made_ms) < _YOUNG_MS


def _late(future: asyncio.Future[Document | None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
