"""Which results: a ResultFilter as a question to MongoDB, in the order of time, from any place on.

    filter ──condition──> {tenant: ..., recorded_at: {...}} ──find──> cursor, newest or oldest first

Every index of results ends in (recorded_at, _id), so that any filter is answered in order without a sort, and from a
place without a skip. The fields that filters name lie in the index too: a document, which may hold a megabyte, is read
only when it is an answer (labels beyond the first aside).
"""

from __future__ import annotations

from pymongo import ASCENDING, DESCENDING
from pymongo.asynchronous.cursor import AsyncCursor

from mesh.mongo import Document
from services.store.documents import EARLIEST, Collections
from services.store.page_token import Position
from services.store.results import result_rules
from shoal.store.v1.store_pb2 import QueryResultsRequest, ResultFilter

WITHOUT_RESPONSE = {"response": 0, "blob": 0}
_EQUAL = ("model_name", "model_version", "tenant", "outcome")


def filter_of(query: QueryResultsRequest) -> ResultFilter:
    """The filter that a query names field by field."""
    made = ResultFilter(
        job_ids=query.job_ids, labels=query.labels, **{field: getattr(query, field) for field in _EQUAL}
    )
    for field in ("since", "until"):
        if query.HasField(field):
            getattr(made, field).CopyFrom(getattr(query, field))
    return made


def find(
    collections: Collections,
    wanted: ResultFilter,
    after: Position | None = None,
    *,
    oldest_first: bool = False,
    omit_response: bool = False,
) -> AsyncCursor[Document]:
    """The cursor of a filter without job ids: newest first, or oldest first; from `after` on. A test explains each."""
    conditions = [condition(wanted), *([beyond(after, oldest_first=oldest_first)] if after else [])]
    cursor = collections.results.find({"$and": conditions}, WITHOUT_RESPONSE if omit_response else None)
    way = ASCENDING if oldest_first else DESCENDING
    return cursor.sort([("recorded_at", way), ("_id", way)])


def condition(wanted: ResultFilter) -> Document:
    """What a document must be to match, job ids included."""
    made: Document = {field: value for field in _EQUAL if (value := getattr(wanted, field))}
    if wanted.job_ids:
        made["_id"] = {"$in": list(wanted.job_ids)}
    # The indexes hold only what has a time: this says that no other is asked for.
    window: Document = {"$gte": result_rules.milliseconds_up(wanted.since) if wanted.HasField("since") else EARLIEST}
    if wanted.HasField("until"):
        window["$lt"] = result_rules.milliseconds_up(wanted.until)
    made["recorded_at"] = window
    if wanted.labels:
        made["$and"] = [{"labels": {"key": key, "value": value}} for key, value in sorted(wanted.labels.items())]
    return made


def beyond(after: Position, *, oldest_first: bool) -> Document:
    """What a document must be to stand after a place, in either order."""
    way = "$gt" if oldest_first else "$lt"
    same = {"recorded_at": after.recorded_at, "_id": {way: after.job_id}}
    # The first bound lets the index start there; the second is exact.
    return {
        "recorded_at": {f"{way}e": after.recorded_at},
        "$or": [{"recorded_at": {way: after.recorded_at}}, same],
    }
