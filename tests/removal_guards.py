"""Removal guards whose steady clock a test sets."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document
from mesh.mongo_clock import Clock
from mesh.removal_guard import Removal, RemovalGuard


def guard_of(
    marks: AsyncCollection[Document], name: str, removal: Removal, clock: Clock, passed: Callable[[], timedelta]
) -> RemovalGuard:
    """Return the guard of a process that starts now. `passed` returns the time of its steady clock."""
    return RemovalGuard(
        marks,
        name,
        removal,
        clock=clock,
        command="set it",
        steady_ns=lambda: passed() // timedelta(microseconds=1) * 1_000,
    )
