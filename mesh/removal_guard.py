"""Guard of automatic removal against a wrong clock: a clock that was set forward makes everything look old at once.

    the clock is as far as the steady clock says ──> removal goes by the clock
    it is ahead ──> removal goes by the time that has certainly passed, and for REST nothing else happens
        the clock is corrected ──────────────────────────────────> removal goes by the clock again
        what would be removed is less than SHARE of all ─────────> removal goes by the clock again
        else: the log asks for a confirmation ──an operator sets a retention rule──> removal goes by the clock again

The certain time is the time of the last round plus what the steady clock has counted since. Between two processes it
does not advance: a start after a long stop counts as a jump, which mostly passes by its small share. It is stored,
because a restart must not make a wrong time the right one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock, steady_ns

log = logging.getLogger(__name__)

MARKS = "removals"
"""Name of the collection with the certain times, one document for each kind of removal."""
MARK_VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "at"],
        "properties": {"at": {"bsonType": "date"}, "asked": {"bsonType": "string"}},
    }
}
SHARE = 0.25
"""Share of what is stored that a jump of the clock may remove without a confirmation. A stop of two days removes about
as much, with a retention of a week."""
SAMPLE = 200
"""Documents by which a share is estimated, to within some three hundredths; a larger sample would read for seconds."""
REST = timedelta(minutes=10)
"""Time for the clock of a machine that has just started to be corrected."""
# A restart takes less, and a clock that is adjusted gradually moves less in a round.
_SLACK = timedelta(minutes=5)
# The log repeats an unanswered question this often.
_REPEATED = timedelta(hours=1)


class Removal(Protocol):
    """Removal that a guard watches. Its methods raise ShoalError while MongoDB is unavailable."""

    async def newest(self) -> datetime | None:
        """Return the time of the newest stored document; None when there is none."""

    async def share(self, now: datetime) -> float:
        """Return the share of what is stored, from 0 to 1, that would be removed at `now`."""

    async def rules_version(self) -> str:
        """Return a text that changes whenever a retention rule is set, also to the same value."""


class RemovalGuard:
    """Clock for decisions about removal, never ahead of the time that has certainly passed, unless confirmed.

    Args:
        name: of the removal, as in "results": the stored time's name, and for messages.
        command: the command that sets a rule, for the question.
    """

    def __init__(
        self,
        marks: AsyncCollection[Document],
        name: str,
        removal: Removal,
        *,
        clock: Clock,
        command: str,
        steady_ns: Callable[[], int] = steady_ns,
    ) -> None:
        self._marks = marks
        self._name = name
        self._removal = removal
        self._clock = clock
        self._command = command
        self._steady_ns = steady_ns
        self._certain: datetime | None = None
        self._certain_at = timedelta(0)
        self._ahead_since: timedelta | None = None
        self._asked_at: timedelta | None = None
        self.is_stopped = False
        """True at the last check: what is past its retention stays until an operator confirms the clock."""

    def __call__(self) -> datetime:
        """Return the time by which removal is decided. Only after the first `check`."""
        assert self._certain is not None, "check first"
        return min(self._clock(), self._certain + (self._steady() - self._certain_at))

    async def check(self) -> None:
        """Compare the clock with the time that has certainly passed: at the start, and before each round.

        Raises:
            ShoalError: MongoDB is unavailable.
        """
        steady = self._steady()
        with translated(f"reading the time of the last removal of {self._name}"):
            mark = await self._marks.find_one({"_id": self._name})
        if self._certain is None:
            self._certain = mark["at"] if mark else await self._removal.newest() or self._clock()
            self._certain_at = steady
        certain, now = self._certain + (steady - self._certain_at), self._clock()
        if mark and mark["at"] > certain:
            # Another process has accepted the clock.
            certain = mark["at"]
        asked = mark.get("asked") if mark else None
        if now - certain <= _SLACK:
            is_accepted = True
            if self._ahead_since is not None:
                log.info(
                    "the clock is right again: removal of %(collection)s goes by it",
                    {"event": "removal.resumed", "collection": self._name},
                )
        else:
            is_accepted, asked = await self._judge(now, now - certain, steady, asked)
        if is_accepted:
            certain, asked, self._ahead_since, self._asked_at = now, None, None, None
        self.is_stopped = asked is not None
        await self._store(certain, asked)
        self._certain, self._certain_at = certain, steady

    async def _judge(
        self, now: datetime, ahead: timedelta, steady: timedelta, asked: str | None
    ) -> tuple[bool, str | None]:
        """Decide on a clock that is ahead. Return whether to go by it, and the rules' version of an open question."""
        if self._ahead_since is None:
            self._ahead_since = steady
            log.warning(
                "MongoDB's clock is %(ahead)s ahead of the last removal of %(collection)s: removal goes by the time "
                "before for %(pause)s",
                {"event": "removal.paused", "ahead": ahead, "collection": self._name, "pause": REST},
            )
        if steady - self._ahead_since < REST:
            return False, asked
        share = await self._removal.share(now)
        if share <= SHARE:
            log.info(
                "removal of %(collection)s goes by the clock: %(percent).0f %% are past their retention",
                {"event": "removal.confirmed_by_clock", "collection": self._name, "percent": share * 100},
            )
            return True, None
        version = await self._removal.rules_version()
        if asked is not None and asked != version:
            log.warning(
                "a retention rule was set: %(percent).0f %% of the %(collection)s are removed",
                {"event": "removal.confirmed_by_rule", "percent": share * 100, "collection": self._name},
            )
            return True, None
        if self._asked_at is None or steady - self._asked_at >= _REPEATED:
            self._asked_at = steady
            log.error(
                "MongoDB's clock is %(ahead)s ahead of the last removal, and %(percent).0f %% of the %(collection)s "
                "would be removed at once. Is the clock (%(clock)s) right? Then confirm: set a retention rule, also to "
                "the value that it has (%(command)s). Otherwise correct the clock",
                {
                    "event": "removal.stopped",
                    "ahead": ahead,
                    "percent": share * 100,
                    "collection": self._name,
                    "clock": now.isoformat(timespec="seconds"),
                    "command": self._command,
                },
            )
        return False, version

    async def _store(self, certain: datetime, asked: str | None) -> None:
        change: Document = {"$set": {"at": certain}, "$unset": {"asked": ""}}
        if asked is not None:
            change = {"$set": {"at": certain, "asked": asked}}
        with translated(f"storing the time of the last removal of {self._name}"):
            await self._marks.update_one({"_id": self._name}, change, upsert=True)

    def _steady(self) -> timedelta:
        return timedelta(microseconds=self._steady_ns() // 1_000)
