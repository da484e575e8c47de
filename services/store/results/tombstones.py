"""What is left of a result that retention has removed: enough that its job can have no other.

The document stays, with its `_id`, and loses all but how it ended. So "the first result stands" needs no second look
anywhere: a later result of that job finds its place taken, as ever. Without `recorded_at` it is in no index of results
and answers no query; a tombstone weighs about a hundred bytes.

    {_id: job id, outcome, code, attempt, generation?, stood_at, removed_at}
"""

from __future__ import annotations

from datetime import datetime

from mesh.mongo import Document

_LEFT = ("outcome", "code", "attempt", "generation")


def burying(now: datetime) -> list[Document]:
    """An update pipeline that makes tombstones of results."""
    left: Document = {field: f"${field}" for field in ("_id", *_LEFT)}
    return [{"$replaceWith": {**left, "stood_at": "$recorded_at", "removed_at": {"$literal": now}}}]


def emptying(now: datetime) -> Document:
    """An update that takes the answers out of results."""
    return {"$set": {"answer_removed_at": now}, "$unset": {"response": "", "blob": ""}}


def is_tombstone(doc: Document) -> bool:
    """Whether retention has removed the result of this document."""
    return "removed_at" in doc
