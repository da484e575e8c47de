"""Translation of a ResultFilter into a MongoDB query, in the order of time, from any position.

    filter ──condition──> {tenant: ..., recorded_at: {...}} ──find──> cursor, newest or oldest first

Every index of results ends in (recorded_at, _id), so every filter is served in order without a sort, and from a
position without a skip. The index also holds the filtered fields, so a document, which may hold a megabyte, is read
only when it matches (except by labels beyond the first). A query that takes too long is limited to a span of its
tenant's results.
"""

from __future__ import annotations

from pymongo import ASCENDING, DESCENDING
from pymongo.asynchronous.cursor import AsyncCursor

from mesh.mongo import Document
from services.store.documents import EARLIEST, Collections
from services.store.page_token import Position
from services.store.results import result_rules
from shoal.store.v1.store_pb2 import QueryResultsRequest, Result, ResultFilter

WITHOUT_RESPONSE = {"response": 0, "blob": 0}
_SUCCEEDED = Result.OUTCOME_SUCCEEDED
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
    last: Position | None = None,
) -> AsyncCursor[Document]:
    """Return the cursor of a filter without job ids, newest or oldest first, after `after`. A test explains each.

    With `last`, it ends there, and examines no results but those of the tenant between the two.
    """
    conditions = [condition(result_filter), *([beyond(after, oldest_first=oldest_first)] if after else [])]
    if last is not None:
        conditions.append(_up_to(last, oldest_first=oldest_first))
    cursor = collections.results.find({"$and": conditions}, WITHOUT_RESPONSE if omit_response else None)
    if last is not None:
        cursor = cursor.hint(_tenant_index(result_filter))
    order = ASCENDING if oldest_first else DESCENDING
    return cursor.sort([("recorded_at", order), ("_id", order)])


def span_ends(
    collections: Collections, result_filter: ResultFilter, after: Position | None, size: int, *, oldest_first: bool
) -> list[AsyncCursor[Document]]:
    """Return cursors of one position each: the first that has one ends a span of the filter's tenant, after `after`.

    The span has at least `size` results and less than twice as many. None has a position when there are fewer. They
    read entries of the index only: for the condition of `beyond`, MongoDB would read the documents.
    """
    of_tenant = ResultFilter()
    of_tenant.CopyFrom(result_filter)
    for field in ("model_name", "model_version", "outcome", "labels"):
        of_tenant.ClearField(field)
    beyonds: list[Document] = [{}]
    if after is not None:
        order = "$gt" if oldest_first else "$lt"
        same_time = {"recorded_at": after.recorded_at, "_id": {order: after.job_id}}
        beyonds = [same_time, {"recorded_at": {order: after.recorded_at}}]
    direction = ASCENDING if oldest_first else DESCENDING
    return [
        collections.results.find({"$and": [condition(of_tenant), further]}, {"recorded_at": 1})
        .hint(_tenant_index(result_filter))
        .sort([("recorded_at", direction), ("_id", direction)])
        .skip(size - 1)
        .limit(1)
        for further in beyonds
    ]


def is_search(result_filter: ResultFilter) -> bool:
    """Return True when no index leads to the matches alone: the query may examine many other results."""
    given = [field for field in _EQUAL if getattr(result_filter, field)]
    conditions = len(given) + len(result_filter.labels)
    return (
        conditions > 1 or given == ["model_version"] or (given == ["outcome"] and result_filter.outcome == _SUCCEEDED)
    )


def _tenant_index(result_filter: ResultFilter) -> str:
    return "by_tenant" if result_filter.tenant else "by_time"


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
    return _side(after, "$gt" if oldest_first else "$lt")


def _up_to(last: Position, *, oldest_first: bool) -> Document:
    """Return the query for results up to a position, that one included, in either order."""
    return _side(last, "$lt" if oldest_first else "$gt", includes_it=True)


def _side(position: Position, order: str, *, includes_it: bool = False) -> Document:
    """Return the query for results on one side of a position: later (`$gt`) or earlier (`$lt`) ones."""
    same = {"recorded_at": position.recorded_at, "_id": {f"{order}e" if includes_it else order: position.job_id}}
    # The first bound is where the index scan starts or ends; the second is exact.
    return {
        "recorded_at": {f"{order}e": position.recorded_at},
        "$or": [{"recorded_at": {order: position.recorded_at}}, same],
    }
