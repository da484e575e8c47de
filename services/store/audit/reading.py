"""Reads of the audit log by time: what `shoal audit list` and `export` show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mesh.mongo import translated
from services.store.audit.entries import Entry, entry_of
from services.store.documents import Collections
from shoal.access.audit import KINDS
from shoal.errors import DataLoss, InvalidArgument

PAGE = 500
"""Entries of one message: at most 1.5 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Entries to read. Empty texts and None demand nothing."""

    kinds: Sequence[str] = ()
    tenant: str = ""
    subject: str = ""
    since: datetime | None = None
    until: datetime | None = None
    newest_first: bool = False
    limit: int = 0
    """0: no limit."""

    def query(self) -> dict[str, Any]:
        """Return the MongoDB filter. Raises InvalidArgument for an unknown kind, or a negative limit."""
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise InvalidArgument(f"kinds: {unknown[0]!r} is unknown, expected some of {', '.join(KINDS)}")
        if self.limit < 0:
            raise InvalidArgument(f"limit: expected 0 or more, got {self.limit}")
        query: dict[str, Any] = {}
        if self.kinds:
            query["kind"] = {"$in": list(self.kinds)}
        if self.tenant:
            query["tenant"] = self.tenant
        if self.subject:
            query["subject"] = self.subject
        times = {"$gte": self.since, "$lt": self.until}
        if bounds := {name: time for name, time in times.items() if time is not None}:
            query["at"] = bounds
        return query


async def read(collections: Collections, wanted: AuditFilter) -> AsyncIterator[list[Entry]]:
    """Yield pages of the entries that match, in the order of their times.

    Raises:
        InvalidArgument: the filter is invalid. DataLoss: a document is no entry. Unavailable: MongoDB is unavailable.
    """
    order = -1 if wanted.newest_first else 1
    with translated("reading the audit log"):
        found = (
            collections.audit.find(wanted.query(), batch_size=PAGE)
            .sort([("at", order), ("_id", order)])
            .hint("by_time")
            .limit(wanted.limit)
        )
        async with found:
            while docs := await found.to_list(PAGE):
                try:
                    yield [entry_of(doc) for doc in docs]
                except (ValueError, KeyError, TypeError) as err:
                    raise DataLoss(
                        f"the audit log has a document that is no entry: {err}: run shoal audit verify"
                    ) from err
