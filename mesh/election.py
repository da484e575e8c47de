"""Who leads: candidates queue up in etcd, the one who came first leads for as long as its lease lasts.

    CAMPAIGNING ──(no candidate with a lower create revision)──> LEADING ──(resign, lease lost or run out)──┐
        ^                                                                                                   │
        └───────────────────────────────────────────────────────────────────────────────────────────────────┘

A candidate is a key under the election's prefix, attached to its lease. It watches the one before it, so a leader's end
wakes its successor and nobody else. The create revision of the leader's key is its fencing token: greater with every
term, and a transaction that demands it (`Term.fence`) fails once the term is over, whatever the old leader believes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from mesh.etcd import Created, Entry, Etcd, Lease, LeaseLost, Put
from mesh.latest import Latest
from mesh.mirror import Copy
from mesh.tasks import Background
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

LEADER = b"/shoal/election/coord/"
"""The election that makes one coord replica the leader of the cluster: whoever acts for it asks here who that is."""
TTL_S = 3
"""A killed leader is succeeded after about so long."""
REFRESH_S = 1.0
_RETRY_S = 0.3
_FAREWELL_S = 1.0


@dataclass(frozen=True)
class Leader:
    """Who leads, as everyone sees it."""

    name: str
    token: int
    """Fencing token: the create revision of its candidacy."""
    since: float
    """Unix seconds: when it began to lead, or to campaign while it has not yet said so."""


@dataclass(frozen=True)
class Term:
    """One's own time as the leader. Ask `is_current` at every act."""

    key: bytes
    token: int
    since: float
    _lease: Lease

    def is_current(self) -> bool:
        """Whether it surely goes on, by the own monotonic clock: no call to etcd, no chance to overstay."""
        return self._lease.is_held()

    @property
    def fence(self) -> Created:
        """The condition of every transaction that only the leader may do."""
        return Created(self.key, self.token)


def candidate_key(prefix: bytes, lease: int) -> bytes:
    """A candidate's key: unique, for so is its lease."""
    return prefix + f"{lease:016x}".encode()


def predecessor(entries: tuple[Entry, ...], key: bytes) -> Entry | None:
    """The candidate just before `key`: the one to wait for. None: `key` is the first.

    Raises:
        LeaseLost: `key` is no candidate (any more).
    """
    own = next((entry for entry in entries if entry.key == key), None)
    if own is None:
        raise LeaseLost("the candidacy is gone")
    before = [entry for entry in entries if entry.create_revision < own.create_revision]
    return max(before, key=lambda entry: entry.create_revision, default=None)


def _is_created(entry: Entry | None, revision: int) -> bool:
    return entry is not None and entry.create_revision == revision


def leader_of(copy: Copy) -> Leader | None:
    """The leader in a copy of the election's keys. None: nobody campaigns."""
    for entry in sorted(copy.entries.values(), key=lambda entry: entry.create_revision):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            raw = json.loads(entry.value)
            return Leader(str(raw["name"]), entry.create_revision, float(raw["since"]))
    return None


class Election(Background):
    """A standing candidacy: campaigns, leads, and campaigns again, for as long as the `async with` block lasts.

    Leaving resigns: the successor leads at once. Neither entering nor leaving waits long for an etcd that is away.
    """

    def __init__(
        self,
        etcd: Etcd,
        prefix: bytes,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._name = name
        self._clock = clock
        self._now = now
        self._term: Latest[Term | None] = Latest(None)

    @property
    def term(self) -> Term | None:
        """The own term, if this candidate leads now."""
        term = self._term.value
        return term if term is not None and term.is_current() else None

    @property
    def is_leader(self) -> bool:
        """Whether this candidate surely leads at this very moment."""
        return self.term is not None

    async def terms(self) -> AsyncIterator[Term]:
        """Yields each of one's own terms as it begins. Never ends."""
        async for term in self._term.follow():
            if term is not None and term.is_current():
                yield term

    async def _run(self) -> None:
        away = False
        while True:
            try:
                lease = await self._etcd.grant(TTL_S, self._clock)
                away = False
                await self._stand(lease)
            except Exception as err:
                if not isinstance(err, ShoalError):  # A fault of ours must not end the candidacy for ever.
                    log.exception("election")
                elif not away:
                    log.warning("cannot stand for election for now: %s", err)
                away = True
                await asyncio.sleep(_RETRY_S)

    async def _stand(self, lease: Lease) -> None:
        """One candidacy: campaigns and leads under `lease`, until that is lost or etcd fails for too long."""
        keeping = asyncio.create_task(self._keep(lease), name="election lease")
        campaign = asyncio.create_task(self._campaign(lease), name="campaign")
        try:
            await asyncio.wait([keeping, campaign], return_when=asyncio.FIRST_COMPLETED)
            if campaign.done() and campaign.exception() is None:
                await keeping
            for task in (keeping, campaign):
                if task.done() and (error := task.exception()) is not None:
                    raise error
        finally:
            if self._term.value is not None:
                log.warning("%s leads no more (term %d)", self._name, self._term.value.token)
            self._term.set(None)
            for task in (keeping, campaign):
                task.cancel()
            await asyncio.gather(keeping, campaign, return_exceptions=True)
            with contextlib.suppress(ShoalError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    await lease.revoke()

    async def _keep(self, lease: Lease) -> None:
        """Refreshes the lease until it is lost, or has run out by the own clock."""
        while lease.is_held():
            await asyncio.sleep(REFRESH_S)
            try:
                # A term that once was over stays over: whoever asked it then has stopped acting.
                await lease.refresh(revive=False)
                term = self._term.value
                # Somebody may have deleted the key by hand: the successor leads then, lease or not.
                if term is not None and not _is_created(await self._etcd.get(term.key), term.token):
                    raise LeaseLost("the leader's key is gone")
            except LeaseLost:
                raise
            except ShoalError as err:
                log.info("the lease of the election was not refreshed: %s", err)
        raise LeaseLost("the lease of the election ran out: etcd could not be reached for too long")

    async def _campaign(self, lease: Lease) -> None:
        """Enters the queue, waits for its turn, and begins the term."""
        key = candidate_key(self._prefix, lease.id)
        token = await self._etcd.put(key, self._record(self._now()), lease.id)
        while True:
            queue = await self._etcd.list(self._prefix)
            before = predecessor(queue.entries, key)
            if before is None:
                break
            await self._until_gone(before.key, queue.revision + 1)
        # The key says since when it leads; rewriting it leaves its create revision as it is.
        since = self._now()
        begun = await self._etcd.transact([Created(key, token)], [Put(key, self._record(since), lease.id)])
        if not begun.succeeded:
            raise LeaseLost("the candidacy is gone")
        log.warning("%s leads (term %d)", self._name, token)
        self._term.set(Term(key, token, since, lease))

    async def _until_gone(self, key: bytes, revision: int) -> None:
        async with aclosing(self._etcd.watch(key, revision)) as changes:
            async for change in changes:
                if any(event.entry is None and event.key == key for event in change.events):
                    return

    def _record(self, since: float) -> bytes:
        return json.dumps({"name": self._name, "since": since}).encode()
