"""Leader election in etcd: candidates queue, and the first in the queue leads while its lease is held.

    CAMPAIGNING ──(no candidate with a lower create revision)──> LEADING ──(resign, lease lost or run out)──┐
        ^                                                                                                   │
        └───────────────────────────────────────────────────────────────────────────────────────────────────┘

A candidate is a key under the election's prefix, attached to the candidate's lease. Each candidate watches only its
predecessor, so the end of a term wakes one successor. The create revision of the leader's key is its fencing token.
The token grows with every term, and a transaction conditioned on it (`Term.fence`) fails once the term is over.
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

from mesh.cluster.etcd import Created, Entry, Etcd, Lease, LeaseLost, Put
from mesh.cluster.mirror import Copy
from mesh.process.tasks import Background
from mesh.process.watched import Watched
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

LEADER = b"/shoal/election/coord/"
"""Prefix of the election among coord's replicas, whose winner leads the cluster."""
TTL_S = 3
"""Time to live of a candidate's lease: a killed leader is replaced after about this long."""
REFRESH_S = 1.0
_RETRY_S = 0.3
_RESIGN_S = 1.0


@dataclass(frozen=True)
class Leader:
    """The leader, as every reader of etcd sees it."""

    name: str
    token: int
    """Fencing token: the create revision of the leader's candidate key."""
    since: float
    """Unix seconds when the term began; before the leader has recorded that, when its candidacy began."""


@dataclass(frozen=True)
class Term:
    """A term of this candidate as the leader. Check `is_current` before every action."""

    key: bytes
    token: int
    since: float
    _lease: Lease

    def is_current(self) -> bool:
        """Return True while the term certainly lasts, by the own monotonic clock and without a call to etcd."""
        return self._lease.is_held()

    @property
    def fence(self) -> Created:
        """Condition for every transaction that only the leader may make."""
        return Created(self.key, self.token)


def candidate_key(prefix: bytes, lease: int) -> bytes:
    """Return the key of the candidate with this lease."""
    return prefix + f"{lease:016x}".encode()


def predecessor(entries: tuple[Entry, ...], key: bytes) -> Entry | None:
    """Return the candidate directly before `key` in the queue; None when `key` is the first.

    Raises:
        LeaseLost: `key` is not a candidate (any more).
    """
    own = next((entry for entry in entries if entry.key == key), None)
    if own is None:
        raise LeaseLost("the candidate's key was deleted")
    before = [entry for entry in entries if entry.create_revision < own.create_revision]
    return max(before, key=lambda entry: entry.create_revision, default=None)


def _is_created(entry: Entry | None, revision: int) -> bool:
    return entry is not None and entry.create_revision == revision


def leader_of(copy: Copy) -> Leader | None:
    """Return the leader in a copy of the election's keys; None without candidates."""
    for entry in sorted(copy.entries.values(), key=lambda entry: entry.create_revision):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            raw = json.loads(entry.value)
            return Leader(str(raw["name"]), entry.create_revision, float(raw["since"]))
    return None


class Election(Background):
    """Candidate that campaigns, leads, and campaigns again while the `async with` block runs.

    Leaving resigns, and the successor leads at once. Entering and leaving wait at most a second for etcd.
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
        self._term: Watched[Term | None] = Watched(None)

    @property
    def term(self) -> Term | None:
        """Current term of this candidate; None while it does not lead."""
        term = self._term.value
        return term if term is not None and term.is_current() else None

    @property
    def is_leader(self) -> bool:
        """True while this candidate certainly leads."""
        return self.term is not None

    async def terms(self) -> AsyncIterator[Term]:
        """Yield each term of this candidate as it begins, for ever."""
        async for term in self._term.follow():
            if term is not None and term.is_current():
                yield term

    async def _run(self) -> None:
        is_failing = False
        while True:
            try:
                lease = await self._etcd.grant(TTL_S, self._clock)
                is_failing = False
                await self._campaign_and_lead(lease)
            except Exception as err:
                if not isinstance(err, ShoalError):  # A bug must not end the candidacy for ever.
                    log.exception("election", {"event": "election.failed"})
                elif not is_failing:
                    log.warning(
                        "cannot take part in the election for now: %(error)s",
                        {"event": "election.retrying", "error": err},
                    )
                is_failing = True
                await asyncio.sleep(_RETRY_S)

    async def _campaign_and_lead(self, lease: Lease) -> None:
        """Campaign and lead under `lease`, until the lease is lost or etcd fails for too long."""
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
                log.warning(
                    "%(name)s no longer leads (term %(term)d)",
                    {"event": "election.lost", "name": self._name, "term": self._term.value.token},
                )
            self._term.set(None)
            for task in (keeping, campaign):
                task.cancel()
            await asyncio.gather(keeping, campaign, return_exceptions=True)
            with contextlib.suppress(ShoalError, TimeoutError):
                async with asyncio.timeout(_RESIGN_S):
                    await lease.revoke()

    async def _keep(self, lease: Lease) -> None:
        """Refresh the lease until it is lost or has expired by the own clock."""
        while lease.is_held():
            await asyncio.sleep(REFRESH_S)
            try:
                # A term that was over once stays over: callers that saw its end have stopped acting.
                await lease.refresh(revive=False)
                term = self._term.value
                # If somebody deleted the key by hand, the successor leads already, although the lease is held.
                if term is not None and not _is_created(await self._etcd.get(term.key), term.token):
                    raise LeaseLost("the leader's key was deleted")
            except LeaseLost:
                raise
            except ShoalError as err:
                log.info(
                    "the lease of the election was not refreshed: %(error)s",
                    {"event": "election.lease_not_refreshed", "error": err},
                )
        raise LeaseLost("the lease of the election expired: etcd was unreachable for too long")

    async def _campaign(self, lease: Lease) -> None:
        """Join the queue, wait to be the first, and begin the term."""
        key = candidate_key(self._prefix, lease.id)
        token = await self._etcd.put(key, self._record(self._now()), lease.id)
        while True:
            queue = await self._etcd.list(self._prefix)
            before = predecessor(queue.entries, key)
            if before is None:
                break
            await self._until_gone(before.key, queue.revision + 1)
        # The value records when the term began. Rewriting it does not change the create revision.
        since = self._now()
        begun = await self._etcd.transact([Created(key, token)], [Put(key, self._record(since), lease.id)])
        if not begun.succeeded:
            raise LeaseLost("the candidate's key was deleted")
        log.info("%(name)s leads (term %(term)d)", {"event": "election.won", "name": self._name, "term": token})
        self._term.set(Term(key, token, since, lease))

    async def _until_gone(self, key: bytes, revision: int) -> None:
        async with aclosing(self._etcd.watch(key, revision)) as changes:
            async for change in changes:
                if any(event.entry is None and event.key == key for event in change.events):
                    return

    def _record(self, since: float) -> bytes:
        return json.dumps({"name": self._name, "since": since}).encode()
