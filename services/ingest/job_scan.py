"""Bounded reads of jobs by a filter, in the order of their ids.

    filter ──conditions of an index──> next 2,000 ids of the index ──the other conditions──> a page, and where it ended

Three indexes serve every filter by state, tenant or model in the order of ids. Other conditions (a second of tenant and
model, a status code, labels, a time) are checked on documents, of which one read examines a bounded number. So a read
that finds nothing among millions of jobs returns after milliseconds, and the caller continues after `ScanPage.end`.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, decoded
from services.ingest.documents import WITHOUT_REQUEST
from services.ingest.job import State

SCANNED_MOST = 2_000
"""Maximum documents that one read examines: about 3 us each in memory, and a few seconds from a slow disk."""

PAGE_BYTES = 16 << 20
"""Size at which a page ends early (labels, long histories), so that it fits into a message of any client."""

ID_ALONE: Mapping[str, int] = {"_id": 1}
"""Fields of a scan whose caller needs the ids."""

_EVERY_STATE = {"$in": sorted(map(str, State))}


@dataclass(frozen=True, slots=True)
class ScanPage:
    """Documents in the order of the scan, and the id after which the next page begins; None: there are no more."""

    documents: list[Document]
    end: str | None


async def scan(
    jobs: AsyncCollection[Document],
    query: Mapping[str, Any],
    size: int,
    *,
    after: str = "",
    order: Literal[1, -1],
    fields: Mapping[str, int] = WITHOUT_REQUEST,
) -> ScanPage:
    """Return up to `size` jobs that match `query`, with these fields, by id after `after` (empty: from the start).

    A page may have fewer documents, or none, although more jobs match: the scan is complete when `end` is None.
    `query` has no condition on `_id`. Raises PyMongoError.
    """
    indexed, others = _split(query)
    if after:
        indexed["_id"] = {"$gt" if order > 0 else "$lt": after}
    sort = {"_id": order}
    if not others:
        found = jobs.find_raw_batches(indexed, fields).sort(sort).limit(size + 1)
        return await _page(decoded(found, jobs), size, None)
    # The last id that this read examines. It is read first: a job may enter or leave the filter at any time.
    bounds = await jobs.find(indexed, {"_id": 1}).sort(sort).skip(SCANNED_MOST - 1).limit(1).to_list()
    last: str | None = bounds[0]["_id"] if bounds else None
    if last is not None:
        indexed["_id"] = {**indexed.get("_id", {}), "$lte" if order > 0 else "$gte": last}
    # MongoDB does not move the second match before the limit, whatever plan it chooses.
    stages: list[Document] = [
        {"$match": indexed},
        {"$sort": sort},
        {"$limit": SCANNED_MOST},
        {"$match": others},
        {"$limit": size + 1},
        {"$project": fields},
    ]
    return await _page(decoded(await jobs.aggregate_raw_batches(stages), jobs), size, last)


async def _page(documents: AsyncIterable[Document], size: int, last: str | None) -> ScanPage:
    found: list[Document] = []
    nbytes = 0
    async for document in documents:
        if len(found) == size or (found and nbytes > PAGE_BYTES):
            return ScanPage(found, found[-1]["_id"])
        found.append(document)
        nbytes += _weight(document)
    return ScanPage(found, last)


def _weight(document: Document) -> int:
    """Return the approximate size of a job's message in bytes."""
    labels = sum(len(key) + len(value) for key, value in document.get("labels") or ())
    steps = sum(80 + len(step.get("reason", "")) for step in document.get("transitions") or ())
    return 500 + len(document.get("last_message") or "") + 4 * labels + steps


def _split(query: Mapping[str, Any]) -> tuple[Document, Document]:
    """Return the conditions that one index answers in the order of ids, and the others."""
    rest = dict(query)
    indexed: Document = {}
    for name in ("tenant", "model_name"):
        if name in rest:
            indexed[name] = rest.pop(name)
            # With each state given, MongoDB merges the states' parts of the index in the order of ids.
            indexed["state"] = rest.pop("state", _EVERY_STATE)
            return indexed, rest
    if "state" in rest:
        indexed["state"] = rest.pop("state")
    return indexed, rest
