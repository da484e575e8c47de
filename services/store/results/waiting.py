"""Calls that wait for the result of a job: woken by what is recorded here, and by a look for what others recorded.

GetResult(wait) ─> waiting, by job <─┬─ results that were just recorded here, with their documents
                                     └─ one query for all that wait, now and then: other instances record too
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
"""Longest a call waits: a stop need not wait for it, and whoever wants to wait longer asks again."""
_MOST = 10_000
# Calls that wait, for memory's sake; each is one small object.
_LOOK_S = 0.1
_REST = 10
# Looking takes at most a tenth of the time.
_AWAY_S = 0.5
_ASKED_AT_ONCE = 1_000
_FULL_MS = 1_000
_ULID_CHARS, _TIME_CHARS = 26, 10
_DIGITS = str.maketrans(
    "0123456789ABCDEFGHJKMNPQRSTVWXYZ", "0123456789abcdefghijklmnopqrstuv", "ILOUabcdefghijklmnopqrstuvwxyz"
)
_YOUNG_MS = 100


class Waiting(Background):
    """All calls that wait. Used as `async with`."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self._calls: dict[str, set[asyncio.Future[Document | None]]] = {}
        self._count = 0
        self._came = asyncio.Event()
        self._is_stopping = False

    def begin(self, job_id: str) -> asyncio.Future[Document | None]:
        """Waits from now on: the future has the result's document once it is recorded here; None: others recorded it.

        Whoever began looks into the database once, since it may have been there before, and ends with `end`.

        Raises:
            ResourceExhausted: too many wait. Unavailable: this instance stops.
        """
        if self._is_stopping:
            raise Unavailable("this instance is stopping: another one has the result")
        if self._count >= _MOST:
            raise ResourceExhausted(f"{_MOST} calls wait for results, which is the limit", retry_after_ms=_FULL_MS)
        future: asyncio.Future[Document | None] = asyncio.get_running_loop().create_future()
        self._calls.setdefault(job_id, set()).add(future)
        self._count += 1
        self._came.set()
        return future

    def end(self, job_id: str, future: asyncio.Future[Document | None]) -> None:
        """Waits no more."""
        self._count -= 1
        future.cancel()
        if (futures := self._calls.get(job_id)) is not None:
            futures.discard(future)
            if not futures:
                del self._calls[job_id]

    @contextmanager
    def for_(self, job_id: str) -> Iterator[asyncio.Future[Document | None]]:
        """Waits while the block lasts. Raises what `begin` does."""
        future = self.begin(job_id)
        try:
            yield future
        finally:
            self.end(job_id, future)

    async def heard(self, future: asyncio.Future[Document | None], wait_s: float) -> Document | None:
        """What a future that was begun comes to.

        Raises:
            TimeoutError: nothing, in that time. Unavailable: this instance stops.
        """
        # And not asyncio.wait_for: whoever waits is woken a round of the loop later by it.
        timer = asyncio.get_running_loop().call_later(wait_s, _late, future)
        try:
            return await future
        finally:
            timer.cancel()

    def recorded(self, docs: Sequence[Document]) -> bool:
        """These were just recorded here. Whether anybody waits."""
        if not self._calls:
            return False
        for doc in docs:
            self._tell(doc["_id"], doc)
        return True

    def stop(self) -> None:
        """Whoever waits asks another instance."""
        self._is_stopping = True
        for futures in self._calls.values():
            for future in futures:
                if not future.done():
                    future.set_exception(Unavailable("this instance is stopping: ask again"))

    def _tell(self, job_id: str, doc: Document | None) -> None:
        for future in self._calls.get(job_id, ()):
            if not future.done():
                future.set_result(doc)

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            await asyncio.sleep(_LOOK_S)
            if not self._calls:
                self._came.clear()
                continue
            began = time.monotonic()
            try:
                await self._look(list(self._calls))
            except ShoalError as err:
                log.info("cannot look for results that others recorded, for now: %s", err)
                await asyncio.sleep(_AWAY_S)
            await asyncio.sleep(_REST * (time.monotonic() - began))

    async def _look(self, job_ids: Sequence[str]) -> None:
        for first in range(0, len(job_ids), _ASKED_AT_ONCE):
            some = list(job_ids[first : first + _ASKED_AT_ONCE])
            with translated("looking for results that others recorded"):
                async for found in self._collections.results.find({"_id": {"$in": some}}, {"_id": 1}):
                    self._tell(found["_id"], None)


def is_young(job_id: str, now: datetime) -> bool:
    """Whether a job came just now, by its id (a ULID, https://github.com/ulid/spec). Of other ids it is not known."""
    try:
        made_ms = int(job_id[:_TIME_CHARS].translate(_DIGITS), 32) if len(job_id) == _ULID_CHARS else 0
    except ValueError:
        return False
    return abs(now.timestamp() * 1000 - made_ms) < _YOUNG_MS  # Ingest's clock may be ahead of this one.


def _late(future: asyncio.Future[Document | None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
