"""The time, as jobs record it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

Clock: TypeAlias = Callable[[], datetime]
"""Gives the time in UTC, in whole milliseconds: what MongoDB can hold, so that a job read back equals the job written.

Instances on different machines may disagree about it, which moves when a lease lapses or a job is due. One that is
ahead by more than a lease (5 s) takes jobs from holders that live, and they run twice; that a job has one result rests
on the fence and on the store, not on clocks.
"""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    """The wall clock."""
    return _EPOCH + timedelta(milliseconds=time.time_ns() // 1_000_000)


def milliseconds(moment: datetime) -> int:
    """Since 1970."""
    return int(moment.timestamp() * 1000 + 0.5)
