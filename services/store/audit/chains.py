"""Chains of the audit log as MongoDB holds them: their names, first and last entries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from services.store.audit.entries import FIRST_HASH, parts_of
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


def range_of(writer: str, first: int = 0, end: int | None = None) -> dict[str, object]:
    """Return a filter for the entries of `writer`, from number `first` on, to the last one or before number `end`."""
    after = _AFTER_DIGITS if end is None else f"{end:012d}"
    return {"_id": {"$gte": f"{writer}/{first:012d}", "$lt": f"{writer}/{after}"}}


def number_of(id_: object) -> int | None:
    """Return the number of an entry by its id; None when the id is that of no entry."""
    parts = parts_of(id_)
    return None if parts is None else parts[1]


async def writers(audit: Collection) -> AsyncIterator[str]:
    """Yield the name of each chain; two index lookups each, however many entries a chain has."""
    async for id_ in _firsts(audit):
        if number_of(id_) is not None:
            yield id_.rpartition("/")[0]


async def strays(audit: Collection) -> AsyncIterator[Any]:
    """Yield the ids of documents that are in no chain: this program writes none."""
    # A comparison matches ids of one type only; bounds of the index have no such limit.
    ids = audit.find({}, {"_id": 1}).hint("_id_")
    for others in (ids.clone().max([("_id", "")]), ids.clone().min([("_id", {})])):
        async for doc in others:
            yield doc["_id"]
    async for id_ in _firsts(audit):
        if number_of(id_) is None:
            yield id_


async def _firsts(audit: Collection) -> AsyncIterator[str]:
    """Yield the id of the first entry of each chain, and of each document with a text as its id that is in none."""
    later = {"$gte": ""}
    while (doc := await audit.find_one({"_id": later}, {"_id": 1}, sort=[("_id", 1)])) is not None:
        id_ = doc["_id"]
        yield id_
        later = {"$gt": id_} if number_of(id_) is None else {"$gte": f"{id_.rpartition('/')[0]}/{_AFTER_DIGITS}"}


async def extent(audit: Collection, writer: str, known: Extent | None) -> Extent | None:
    """Return the extent of a chain, which was `known` at the last anchor; None when it has no entries."""
    first, before = (known.first, known.before) if known is not None else (1, FIRST_HASH)
    async with audit.find(range_of(writer), {"hash": 1}).sort("_id", -1) as found:
        async for last in found:
            # Others were made by hand, and are named by verification.
            if (number := number_of(last["_id"])) is not None:
                return Extent(first, before, number, last["hash"])
    return None
