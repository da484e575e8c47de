"""Tombstone: remainder of a result that retention has removed, so that its job can have no other result.

The document keeps its `_id` and its outcome, and loses the rest. So "the first result stands" needs no other check: a
later result of that job conflicts, as always. Without `recorded_at`, a tombstone is in no index of results and matches
no query; it takes about a hundred bytes.

    {_id: job id, outcome, code, attempt, generation?, tenant?, stood_at, removed_at}
"""

from __future__ import annotations

from datetime import datetime

from mesh.mongo import Document

_KEPT = ("outcome", "code", "attempt", "generation", "tenant")


def to_tombstone(now: datetime) -> list[Document]:
    """Return the update pipeline that turns results into tombstones."""
    fields: Document = {field: f"${field}" for field in ("_id", *_KEPT)}
    return [{"$replaceWith": {**fields, "stood_at": "$recorded_at", "removed_at": {"$literal": now}}}]


def without_answer(now: datetime) -> Document:
    """Return the update that removes the answers of results."""
    return {"$set": {"answer_removed_at": now}, "$unset": {"response": "", "blob": ""}}


def is_tombstone(doc: Document) -> bool:
    """Return True when retention has removed the result of this document."""
    return "removed_at" in doc
