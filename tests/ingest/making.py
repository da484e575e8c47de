"""Jobs for tests."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from mesh.mongo_clock import Clock, milliseconds
from services.ingest.instance import Instance
from services.ingest.job import Job, acceptance
from services.ingest.ulid import Ulids

START = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
_ulids = Ulids(lambda: milliseconds(START))


def job(**fields: Any) -> Job:
    """A job that was just submitted."""
    made: dict[str, Any] = {
        "id": _ulids.new(),
        "model_name": "m",
        "submitted_at": START,
        "updated_at": START,
        "due_at": START,
        "request": b"request",
        "transitions": acceptance(START, "local/ingest-0"),
        **fields,
    }
    return Job(**made)


def instance(clock: Clock, name: str = "local/ingest-0", process: str = "p") -> Instance:
    """An instance whose ids are unlike those of any other name or process."""
    ids = Ulids(lambda: 1)
    return Instance(name, process, clock, lambda: f"{name} {process} {ids.new()}", asyncio.Event())


class TestClock:
    """Time that moves when it is told to."""

    __test__ = False

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)
