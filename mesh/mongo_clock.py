"""Clock of jobs and results: the time of MongoDB's primary, which all instances share, whatever their machines say.

    primary's clock ──hello, every 10 s──> bounds of the offset ──> the offset moves into these bounds
    steady clock of the machine + offset = now

On one machine the offset never moves. Where clocks differ, all instances follow the primary's clock to within a round
trip. A new primary may have another time, which instances learn one after the other. Until all instances have
synchronized, leases start at the later time and lapse by the earlier one (`latest`, `earliest`), so that no live holder
loses its lease.
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
"""Returns the time in UTC, in whole milliseconds. MongoDB holds no finer time, so a job read equals the job written."""

SYNC_S = 10.0
"""Interval at which the clock reads MongoDB's time."""
# Three intervals and the longest response: an instance that can still renew a lease has synchronized by then.
_SETTLED_NS = 35 * 10**9
# A smaller change is a gradual adjustment: a tenth of a lease.
_JUMP_NS = 500_000_000
# Bound of a lease's start in the future after a clock was set back: its holder may die, and the lease must lapse.
_MAX_AHEAD_NS = 60 * 10**9
# A difference to the machine's clock is logged when it changes by so much.
_REPORTED_NS = 1_000_000_000
# A response this fast bounds the offset well enough; slower ones are repeated.
_QUICK_NS = 5_000_000
_TRIES = 3
_MS = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    """Return the time of this machine's wall clock."""
    return _moment(time.time_ns())


def milliseconds(moment: datetime) -> int:
    """Return the milliseconds since 1970."""
    return int(moment.timestamp() * 1000 + 0.5)


def steady_ns() -> int:
    """Return the time of a clock that is never set, and that counts while the machine sleeps where that exists."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class DatabaseClock(Background):
    """Clock of MongoDB's primary; the machine's own time until the first `synchronize`."""

    def __init__(
        self,
        database: AsyncDatabase[Document],
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        steady_ns: Callable[[], int] = steady_ns,
    ) -> None:
        self._database = database
        self._wall_ns = wall_ns
        self._steady_ns = steady_ns
        # Nanoseconds since 1970 at the zero of the steady clock: now, and before the last jump.
        self._offset = self._before = wall_ns() - steady_ns()
        self._settled_at = 0
        self._is_synchronized = False
        self.round_trip_s = 0.0
        """Time of the last read of MongoDB's clock: the network and the primary. 0: there was none."""
        self.ahead_s = 0.0
        """Time by which this machine's clock is ahead of MongoDB's, at the last read; negative: behind."""
        self._reported_ns = 0

    def __call__(self) -> datetime:
        return _moment(self._offset + self._steady_ns())

    def earliest(self) -> datetime:
        """Return the earliest time of any instance's clock: a lease that has lapsed by it has lapsed for all."""
        steady = self._steady_ns()
        return _moment(steady + (min(self._offset, self._before) if steady < self._settled_at else self._offset))

    def latest(self) -> datetime:
        """Return the latest time of any instance's clock, at most a minute ahead: the start of new leases."""
        steady = self._steady_ns()
        if steady < self._settled_at:
            return _moment(steady + max(self._offset, min(self._before, self._offset + _MAX_AHEAD_NS)))
        return _moment(steady + self._offset)

    async def synchronize(self) -> None:
        """Move the offset into the bounds of MongoDB's time.

        Raises:
            ShoalError: MongoDB is unavailable; the clock continues with its present offset.
        """
        low, high = await self._offset_bounds()
        for _ in range(_TRIES - 1):
            if high - low < _QUICK_NS or low <= self._offset <= high:
                break
            next_low, next_high = await self._offset_bounds()
            low, high = max(low, next_low), min(high, next_high)
        # Otherwise the primary's clock was set between the reads: the next call finds the new time.
        if low <= high:
            self._adjust(low, high)

    async def _run(self) -> None:
        await for_ever(
            "ask MongoDB for the time", self._synchronize_and_wait, away_s=SYNC_S, log=log, level=logging.INFO
        )

    async def _synchronize_and_wait(self) -> float:
        if self._is_synchronized:
            await self.synchronize()
        return SYNC_S

    async def _offset_bounds(self) -> tuple[int, int]:
        """Read MongoDB's time, and return the lowest and the highest possible offset."""
        before = self._steady_ns()
        with translated("reading MongoDB's time"):
            reply = await self._database.client.admin.command("hello")
        after = self._steady_ns()
        self.round_trip_s = (after - before) / 1e9
        # MongoDB rounds down to milliseconds.
        primary_ns = milliseconds(reply["localTime"]) * _MS
        return primary_ns - after, primary_ns + _MS - 1 - before

    def _adjust(self, low: int, high: int) -> None:
        offset, steady = min(max(self._offset, low), high), self._steady_ns()
        moved = offset - self._offset
        if self._is_synchronized and abs(moved) >= _JUMP_NS:
            candidates = (self._offset, self._before) if steady < self._settled_at else (self._offset,)
            self._before = max(candidates, key=lambda before: abs(offset - before))
            self._settled_at = steady + _SETTLED_NS
            log.warning(
                "MongoDB's clock was set %(direction)s by %(seconds).1f s",
                {
                    "event": "clock.mongo_was_set",
                    "direction": "forward" if moved > 0 else "back",
                    "seconds": abs(moved) / 1e9,
                },
            )
        self._offset, self._is_synchronized = offset, True
        ahead = self._wall_ns() - (offset + steady)
        self.ahead_s = ahead / 1e9
        if abs(ahead - self._reported_ns) >= _REPORTED_NS:
            self._reported_ns = ahead
            if abs(ahead) < _REPORTED_NS:
                log.info("this machine's clock and MongoDB's agree again", {"event": "clock.agrees"})
            else:
                log.warning(
                    "this machine's clock is %(seconds).1f s %(direction)s MongoDB's, which Shoal uses: correct this "
                    "machine's clock",
                    {
                        "event": "clock.off",
                        "seconds": abs(ahead) / 1e9,
                        "direction": "ahead of" if ahead > 0 else "behind",
                    },
                )


def earliest(clock: Clock) -> datetime:
    """Return the earliest time of any instance's clock, as `clock` knows it."""
    return clock.earliest() if isinstance(clock, DatabaseClock) else clock()


def latest(clock: Clock) -> datetime:
    """Return the latest time of any instance's clock, as `clock` knows it."""
    return clock.latest() if isinstance(clock, DatabaseClock) else clock()


def _moment(ns: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ns // _MS)
