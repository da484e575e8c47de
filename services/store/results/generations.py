"""Generations of a job: a requeued dead letter runs as the next generation, with a result of its own.

    generation 1   FAILED  ──requeued──> generation 2   SUCCEEDED
                   stands until then                    stands from then on, against every late result of 1 and 2

Within a generation the first result stands. The result of a later generation replaces an earlier FAILED one, in a write
whose filter demands both: of two concurrent writes one wins, and a slow writer overwrites nothing. A job that
succeeded, was cancelled or expired is never requeued, and its result is never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymongo import ReplaceOne

from mesh.mongo import Document
from services.store.documents import Collection
from shoal.store.v1.store_pb2 import Result

FIRST = 1
MOST = 1_000_000
_FINAL = [Result.OUTCOME_SUCCEEDED, Result.OUTCOME_CANCELLED, Result.OUTCOME_EXPIRED]


def generation_of(doc: Document) -> int:
    """Return the generation of a result. The first generation is not stored."""
    return int(doc.get("generation", FIRST))


async def succeed(results: Collection, docs: Sequence[Document]) -> set[str]:
    """Replace earlier failures by those of `docs` that belong to a later generation.

    A document that finds no earlier failure changes nothing; the caller reads the standing result afterwards. Returns
    the jobs that had a result (not only a tombstone) just before.
    """
    later = [doc for doc in docs if generation_of(doc) > FIRST]
    if not later:
        return set()
    some = {"_id": {"$in": [doc["_id"] for doc in later]}, "removed_at": {"$exists": False}}
    existing = {doc["_id"] async for doc in results.find(some, {"_id": 1}).hint("_id_")}
    await results.bulk_write([ReplaceOne(_earlier_failure(doc), doc) for doc in later], ordered=False)
    return existing


def is_same(doc: Document, standing: Document) -> bool:
    """Return True when `standing`, read back without its response, is `doc` itself, written by `succeed`."""
    return generation_of(doc) > FIRST and all(doc.get(field) == value for field, value in standing.items())


def _earlier_failure(doc: Document) -> Document:
    generation = generation_of(doc)
    earlier = [{"generation": {"$lt": generation}}, {"generation": {"$exists": False}}]
    return {"_id": doc["_id"], "outcome": {"$nin": _FINAL}, "$or": earlier}
