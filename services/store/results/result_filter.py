"""Translation of a ResultFilter into a MongoDB query, in the order of time, from any position.

    filter ──condition──> {tenant: ..., recorded_at: {...}} ──find──> cursor, newest or oldest first

Every index of results ends in (recorded_at, _id), so every filter is served in order without a sort, and from a
position without a skip. The index also holds the filtered fields, so a document, which may hold a megabyte, is read
only when it matches (except by labels beyond the first).
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
    """Return the filter of a query's fields."""
    made = ResultFilter(
        job_ids=query.job_ids, labels=query.labels, **{field: getattr(query, field) for field in _EQUAL}
    )
    for field in ("since", "until"):
        if query.HasField(field):
            getattr(made, field).CopyFrom(getattr(query, field))
    return made


def find(
    collections: Collections,
    result_filter: ResultFilter,
    after: Position | None = None,
    *,
    oldest_first: bool = False,
    omit_response: bool = False,
) -> AsyncCursor[Document]:
    """Return the cursor of a filter without job ids, newest or oldest first, after `after`. A test explains each."""
    conditions = [condition(result_filter), *([beyond(after, oldest_first=oldest_first)] if after else [])]
    cursor = collections.results.find({"$and": conditions}, WITHOUT_RESPONSE if omit_response else None)
    order = ASCENDING if oldest_first else DESCENDING
    return cursor.sort([("recorded_at", order), ("_id", order)])


def condition(result_filter: ResultFilter) -> Document:
    """Return the query of a filter, job ids included."""
    query: Document = {field: value for field in _EQUAL if (value := getattr(result_filter, field))}
    if result_filter.job_ids:
        query["_id"] = {"$in": list(result_filter.job_ids)}
    # The indexes hold only documents with a time, so every query must demand one.
    since = result_rules.milliseconds_up(result_filter.since) if result_filter.HasField("since") else EARLIEST
    window: Document = {"$gte": since}
    if result_filter.HasField("until"):
        window["$lt"] = result_rules.milliseconds_up(result_filter.until)
    query["recorded_at"] = window
    if result_filter.labels:
        query["$and"] = [
            {"labels": {"key": key, "value": value}} for key, value in sorted(result_filter.labels.items())
        ]
    return query


def beyond(after: Position, *, oldest_first: bool) -> Document:
    """Return the query for results after a position, in either order."""
    order = "$gt" if oldest_first else "$lt"
    same = {"recorded_at": after.recorded_at, "_id": {order: after.job_id}}
    # The first bound is where the index scan starts; the second is exact.
    return {
        "recorded_at": {f"{order}e": after.recorded_at},
        "$or": [{"recorded_at": {order: after.recorded_at}}, same],
    }
