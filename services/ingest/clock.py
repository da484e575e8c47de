"""The time, as jobs record it: MongoDB's, which all instances share, whatever the clocks of their machines say.

    primary's clock ──hello, every 10 s──> between which two moments of ours? ──> the offset moves into these bounds
    steady clock of the machine + offset = now

On one machine the offset never moves. Where clocks differ, all instances go by the primary's to within a round trip.
That of a new primary may be another one: instances hear of it one after the other. Until all must have heard, leases
are given by whichever time is later, and lapse by whichever is earlier (`latest`, `earliest`), so that no living holder
is taken for dead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever

log = logging.getLogger(__name__)

Clock: TypeAlias = Callable[[], datetime]
"""Gives the time in UTC, in whole milliseconds: what MongoDB can hold, so a job that is read equals the job written."""

LOOK_S = 10.0
"""How often MongoDB is asked for the time."""
_SETTLED_NS = 35 * 10**9
# Three looks and the longest answer: whoever can still renew a lease has heard the time by then.
_JUMP_NS = 500_000_000
# A smaller move is a clock that is being adjusted: a tenth of a lease.
_FURTHEST_NS = 60 * 10**9
# Leases are not given for longer than so much, however far a clock was put back: their holders may die.
_TOLD_NS = 1_000_000_000
_QUICK_NS = 5_000_000
_TRIES = 3
_MS = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    """This machine's wall clock."""
    return _moment(time.time_ns())


def milliseconds(moment: datetime) -> int:
    """Since 1970."""
    return int(moment.timestamp() * 1000 + 0.5)


def _steady_ns() -> int:
    """Never put forward or back, and goes on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class DatabaseClock(Background):
    """A Clock: the time of MongoDB's primary, and the machine's own until the first `look`."""

    def __init__(
        self,
        database: AsyncDatabase[Document],
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        steady_ns: Callable[[], int] = _steady_ns,
    ) -> None:
        self._database = database
        self._wall_ns = wall_ns
        self._steady_ns = steady_ns
        self._offset = self._before = wall_ns() - steady_ns()
        # Nanoseconds since 1970 when the steady clock was at 0: now, and before the last jump.
        self._settled_at = 0
        self._has_looked = False
        self._told = 0

    def __call__(self) -> datetime:
        return _moment(self._offset + self._steady_ns())

    def earliest(self) -> datetime:
        """The earliest that it may be by any instance's clock: what has lapsed by this has lapsed for all."""
        steady = self._steady_ns()
        return _moment(steady + (min(self._offset, self._before) if steady < self._settled_at else self._offset))

    def latest(self) -> datetime:
        """The latest that it may be by any instance's clock, a minute ahead at most: from here on leases are given."""
        steady = self._steady_ns()
        if steady < self._settled_at:
            return _moment(steady + max(self._offset, min(self._before, self._offset + _FURTHEST_NS)))
        return _moment(steady + self._offset)

    async def look(self) -> None:
        """Asks MongoDB for its time.

        Raises:
            ShoalError: it does not answer; the time goes on as it was.
        """
        low, high = await self._asked()
        for _ in range(_TRIES - 1):
            if high - low < _QUICK_NS or low <= self._offset <= high:
                break
            next_low, next_high = await self._asked()
            low, high = max(low, next_low), min(high, next_high)
        if low <= high:  # Else it was put forward or back meanwhile: the next look tells.
            self._hear(low, high)

    async def _run(self) -> None:
        await for_ever("ask MongoDB for the time", self._look_and_rest, away_s=LOOK_S, log=log, level=logging.INFO)

    async def _look_and_rest(self) -> float:
        if self._has_looked:
            await self.look()
        return LOOK_S

    async def _asked(self) -> tuple[int, int]:
        """Between which two the offset lies."""
        before = self._steady_ns()
        with translated("asking MongoDB for the time"):
            told = await self._database.client.admin.command("hello")
        after = self._steady_ns()
        theirs = milliseconds(told["localTime"]) * _MS  # Rounded down by it.
        return theirs - after, theirs + _MS - 1 - before

    def _hear(self, low: int, high: int) -> None:
        offset, steady = min(max(self._offset, low), high), self._steady_ns()
        moved = offset - self._offset
        if self._has_looked and abs(moved) >= _JUMP_NS:
            candidates = (self._offset, self._before) if steady < self._settled_at else (self._offset,)
            self._before = max(candidates, key=lambda before: abs(offset - before))
            self._settled_at = steady + _SETTLED_NS
            log.warning("MongoDB's clock was put %s by %.1f s", "forward" if moved > 0 else "back", abs(moved) / 1e9)
        self._offset, self._has_looked = offset, True
        ahead = self._wall_ns() - (offset + steady)
        if abs(ahead - self._told) >= _TOLD_NS:
            self._told = ahead
            if abs(ahead) < _TOLD_NS:
                log.info("this machine's clock and MongoDB's agree again")
            else:
                where = "ahead of" if ahead > 0 else "behind"
                log.warning(
                    "this machine's clock is %.1f s %s MongoDB's, by which jobs go: set it right",
                    abs(ahead) / 1e9,
                    where,
                )


def earliest(clock: Clock) -> datetime:
    """By `clock`: the earliest that it may be by any instance's."""
    return clock.earliest() if isinstance(clock, DatabaseClock) else clock()


def latest(clock: Clock) -> datetime:
    """By `clock`: the latest that it may be by any instance's."""
    return clock.latest() if isinstance(clock, DatabaseClock) else clock()


def _moment(ns: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ns // _MS)
