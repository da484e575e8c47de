"""Generations of a job: a dead letter that is put into the queue again runs as the next one, with a result of its own.

    generation 1   FAILED  ──requeued──> generation 2   SUCCEEDED
                   stands until then                    stands from then on, against every late result of 1 and 2

Within a generation the first result stands. A result of a later one takes the place of an earlier FAILED one, in a
write whose filter demands both: so of two that race one wins, and whoever was only slow overwrites nothing. What
succeeded, was cancelled or expired is never requeued, and is never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymongo import ReplaceOne

from mesh.mongo import Document
from services.store.documents import Collection
from shoal.store.v1.store_pb2 import Result

FIRST = 1
MOST = 1_000_000
_STANDS_FOR_EVER = [Result.OUTCOME_SUCCEEDED, Result.OUTCOME_CANCELLED, Result.OUTCOME_EXPIRED]


def generation_of(doc: Document) -> int:
    """The generation that a result belongs to; only later ones than the first are written down."""
    return int(doc.get("generation", FIRST))


async def succeed(results: Collection, docs: Sequence[Document]) -> set[str]:
    """Puts those of `docs` that belong to a later generation in the place of earlier failures.

    One that does not find its place changes nothing: what stands is read afterwards. Gives the jobs whose results were
    there just before, and not only what retention leaves of them.
    """
    later = [doc for doc in docs if generation_of(doc) > FIRST]
    if not later:
        return set()
    some = {"_id": {"$in": [doc["_id"] for doc in later]}, "removed_at": {"$exists": False}}
    there = {doc["_id"] async for doc in results.find(some, {"_id": 1}).hint("_id_")}
    await results.bulk_write([ReplaceOne(_earlier_failure(doc), doc) for doc in later], ordered=False)
    return there


def is_same(doc: Document, standing: Document) -> bool:
    """Whether `standing`, read back without its response, is what `doc` put there: `succeed` says so of none."""
    return generation_of(doc) > FIRST and all(doc.get(field) == value for field, value in standing.items())


def _earlier_failure(doc: Document) -> Document:
    generation = generation_of(doc)
    earlier = [{"generation": {"$lt": generation}}, {"generation": {"$exists": False}}]
    return {"_id": doc["_id"], "outcome": {"$nin": _STANDS_FOR_EVER}, "$or": earlier}
