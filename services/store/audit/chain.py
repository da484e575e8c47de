"""Writer of one chain of the audit log: the entries of this store process, each durable when `record` returns.

    record ──┐
    record ──┼──> one insert for all that wait ──majority, journaled──> callers go on
    record ──┘        └──failed: callers get Unavailable; the same documents are inserted again before later ones

After a failure nobody knows whether the documents were written. The repeat finds them by their ids, and continues when
they are the same. Entries of acts that were refused that way have no outcome.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType

from pymongo.errors import BulkWriteError

from mesh.mongo import translated
from mesh.mongo_clock import milliseconds
from mesh.process.tasks import end, log_failure
from services.store.audit.entries import FIRST_HASH, Entry, chained
from services.store.documents import Collections
from shoal.access.audit import CHAIN, Event
from shoal.errors import ResourceExhausted, ShoalError, Unavailable

log = logging.getLogger(__name__)

MAX_WAITING = 2_000
"""Events that wait to be written, of all callers; some 1 MiB. More are refused."""
_AT_ONCE = 500
_CLOSE_S = 1.0
_DUPLICATE_KEY = 11000


class AuditChain:
    """The chain of this process. Use as `async with`; leaving writes the chain's end."""

    def __init__(self, collections: Collections, clock: Callable[[], datetime], instance: str) -> None:
        """Begin a chain for `instance`, which its entries name; nothing is written before the first event."""
        self._collections = collections
        self._clock = clock
        self._instance = instance
        self._waiting: list[tuple[Event, asyncio.Future[Entry]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._closed = False
        self.written = 0
        """Entries that were written for callers."""
        self.failed = 0
        """Entries that could not be written: administrative acts among them were refused."""
        self._begin()

    def _begin(self) -> None:
        self.writer = f"{self._instance}-{milliseconds(self._clock()):x}-{secrets.token_hex(4)}"
        self.head: Entry | None = None
        """Last entry that is certainly written."""
        self._unsettled: list[Entry] = []

    async def __aenter__(self) -> AuditChain:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._closed = True
        if self.head is not None or self._waiting or self._unsettled:
            future = self._enqueue(Event(kind=CHAIN, origin=self._instance, reason="end"))
            await asyncio.wait([future], timeout=_CLOSE_S)
            if not future.done() or future.exception() is not None:
                log.warning(
                    "the end of the audit chain %(writer)s was not written",
                    {"event": "audit.end_not_written", "writer": self.writer},
                )
        if self._writing is not None:
            await end(self._writing)
        self._fail_waiting(Unavailable("the store is stopping"))

    @property
    def waiting_count(self) -> int:
        """Number of entries that wait to be written."""
        return len(self._waiting)

    async def record(self, events: Sequence[Event]) -> list[str]:
        """Write events in their order, and return the ids of their entries once they are durable.

        A cancelled caller's events may be written all the same.

        Raises:
            InvalidArgument: an event is invalid; none is written.
            ResourceExhausted: too many events wait.
            Unavailable: the events may not have been written: the caller must not do what it announced.
        """
        events = [event.checked() for event in events]
        if self._closed:
            raise Unavailable("the store is stopping")
        if len(self._waiting) + len(events) > MAX_WAITING:
            raise ResourceExhausted(f"{len(self._waiting)} audit events wait to be written: retry in a moment")
        outcomes = await asyncio.gather(*map(self._enqueue, events), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome.id for outcome in outcomes if isinstance(outcome, Entry)]

    def _enqueue(self, event: Event) -> asyncio.Future[Entry]:
        future: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._waiting.append((event, future))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="audit")
            self._writing.add_done_callback(log_failure)
        return future

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
            try:
                await self._settle()
                entries = self._unsettled = self._chained([event for event, _ in batch])
                await self._settle()
            except BaseException as err:
                failure = err if isinstance(err, ShoalError) else Unavailable("the audit log was not written")
                self.failed += len(batch)
                for _, future in batch:
                    _fail(future, failure)
                if not isinstance(err, ShoalError):
                    self._fail_waiting(failure)
                    raise
                continue
            self.written += len(batch)
            # A chain's own entries precede the events.
            for (_, future), entry in zip(reversed(batch), reversed(entries), strict=False):
                if not future.done():
                    future.set_result(entry)

    def _chained(self, events: list[Event]) -> list[Entry]:
        if self.head is None:
            events = [Event(kind=CHAIN, origin=self._instance, reason="begin"), *events]
        entries: list[Entry] = []
        last = self.head
        now_ms = milliseconds(self._clock())
        for event in events:
            n, at_ms, previous = (last.n + 1, max(now_ms, last.at_ms), last.hash) if last else (1, now_ms, FIRST_HASH)
            last = chained(self.writer, n, at_ms, event, previous)
            entries.append(last)
        return entries

    async def _settle(self) -> None:
        """Insert the unsettled entries, those that an earlier attempt may have inserted included."""
        if not self._unsettled:
            return
        documents = {entry.id: entry.document() for entry in self._unsettled}
        collection = self._collections.audit
        with translated("writing the audit log"):
            try:
                await collection.insert_many(list(documents.values()), ordered=True)
            except BulkWriteError as err:
                errors = err.details["writeErrors"]
                if not errors or any(one["code"] != _DUPLICATE_KEY for one in errors):
                    raise
                found = {doc["_id"]: doc async for doc in collection.find({"_id": {"$in": list(documents)}})}
                if any(doc != documents[id_] for id_, doc in found.items()):
                    log.error(
                        "audit chain %(writer)s has entries that this process did not write: it ends",
                        {"event": "audit.chain_ended", "writer": self.writer},
                    )
                    self._begin()
                    raise Unavailable("the audit log was changed from outside: retry, a new chain begins") from err
                if missing := [doc for id_, doc in documents.items() if id_ not in found]:
                    await collection.insert_many(missing, ordered=True)
        self.head = self._unsettled[-1]
        self._unsettled = []

    def _fail_waiting(self, error: ShoalError) -> None:
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            _fail(future, error)


def _fail(future: asyncio.Future[Entry], error: ShoalError) -> None:
    if not future.done():
        future.set_exception(error)
        # Retrieved: its caller may have left.
        future.exception()
