"""Chains of the audit log as MongoDB holds them: their names, first and last entries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.store.audit.entries import FIRST_HASH
from services.store.documents import Collection

# Sorts after every digit, and so after every entry of its writer.
_AFTER_DIGITS = ":"


@dataclass(frozen=True, slots=True)
class Extent:
    """Part of a chain that is kept: the entries `first` to `last`."""

    first: int
    before: str
    """Hash of the entry before `first`, which retention has removed; FIRST_HASH when it never existed."""
    last: int
    last_hash: str

    @property
    def is_empty(self) -> bool:
        return self.first > self.last


def range_of(writer: str, first: int = 0) -> dict[str, object]:
    """Return a filter for the entries of `writer`, from number `first` on."""
    return {"_id": {"$gte": f"{writer}/{first:012d}", "$lt": f"{writer}/{_AFTER_DIGITS}"}}


async def writers(audit: Collection) -> AsyncIterator[str]:
    """Yield the name of each chain; two index lookups each, however many entries a chain has."""
    after = ""
    while (doc := await audit.find_one({"_id": {"$gt": after}}, {"_id": 1}, sort=[("_id", 1)])) is not None:
        writer = doc["_id"].rpartition("/")[0]
        yield writer
        after = f"{writer}/{_AFTER_DIGITS}"


async def extent(audit: Collection, writer: str, known: Extent | None) -> Extent | None:
    """Return the extent of a chain, which was `known` at the last anchor; None when it has no entries."""
    last = await audit.find_one(range_of(writer), {"hash": 1}, sort=[("_id", -1)])
    if last is None:
        return None
    number = int(last["_id"].rpartition("/")[2])
    first, before = (known.first, known.before) if known is not None else (1, FIRST_HASH)
    return Extent(first, before, number, last["hash"])
