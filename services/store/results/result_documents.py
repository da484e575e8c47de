"""Translation of results to and from MongoDB documents, exact to the nanosecond of `submitted_at`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.mongo import Document
from services.store.results.generations import FIRST
from services.store.results.tombstones import is_tombstone
from shoal.store.v1.store_pb2 import Result

_SAME = ("outcome", "model_name", "model_version", "code", "message", "attempt", "lease_id", "tenant", "instance")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class BlobRef:
    """Reference to a blob: its key, size and digest."""

    key: str
    size: int
    sha256: str


def document(result: Result, recorded_at: datetime, response: bytes | BlobRef | None) -> Document:
    """Return the document of `result`. `response`: the serialised response, or the reference to its blob."""
    doc: Document = {"_id": result.job_id, **{field: getattr(result, field) for field in _SAME}}
    doc["recorded_at"] = recorded_at
    if result.generation > FIRST:
        doc["generation"] = result.generation
    if result.HasField("submitted_at"):
        time = result.submitted_at
        milliseconds, doc["submitted_ns"] = divmod(time.nanos, 1_000_000)
        doc["submitted_at"] = _EPOCH + timedelta(seconds=time.seconds, milliseconds=milliseconds)
    if result.labels:
        doc["labels"] = [{"key": key, "value": value} for key, value in sorted(result.labels.items())]
    if isinstance(response, bytes):
        doc["response"] = response
    elif response is not None:
        doc["blob"] = vars(response)
    return doc


def result(doc: Document) -> Result:
    """Return the result of a document, with its response when the document itself holds it.

    Raises:
        google.protobuf.message.DecodeError: the stored response is no ModelInferResponse.
    """
    if is_tombstone(doc):
        return _removed(doc)
    labels = {label["key"]: label["value"] for label in doc.get("labels", ())}
    found = Result(
        job_id=doc["_id"],
        recorded_at=timestamp(doc["recorded_at"]),
        labels=labels,
    )
    for field in _SAME:
        setattr(found, field, doc[field])
    found.generation = doc.get("generation", 0)
    if removed := doc.get("answer_removed_at"):
        found.answer_removed_at.CopyFrom(timestamp(removed))
    if submitted := doc.get("submitted_at"):
        found.submitted_at.CopyFrom(timestamp(submitted))
        found.submitted_at.nanos += doc.get("submitted_ns", 0)
    if (response := doc.get("response")) is not None:
        found.response.SetInParent()
        found.response.MergeFromString(response)
    return found


def _removed(doc: Document) -> Result:
    """Return the result of a tombstone."""
    return Result(
        job_id=doc["_id"],
        outcome=doc["outcome"],
        code=doc["code"],
        message=f"its result was removed by retention, {doc['removed_at']:%Y-%m-%d %H:%M} UTC",
        attempt=doc["attempt"],
        generation=doc.get("generation", 0),
        recorded_at=timestamp(doc["stood_at"]),
        removed_at=timestamp(doc["removed_at"]),
    )


def blob_of(doc: Document) -> BlobRef | None:
    """Return the reference to the document's response, when that is a blob."""
    return BlobRef(**doc["blob"]) if "blob" in doc else None


def response_bytes(doc: Document) -> int:
    """Return the size of the response, inside the document or in a blob."""
    if "blob" in doc:
        return int(doc["blob"]["size"])
    return inline_bytes(doc)


def inline_bytes(doc: Document) -> int:
    """Return the size of the response inside the document."""
    return len(doc.get("response", b""))


def timestamp(time: datetime) -> Timestamp:
    """Return `time` as a protobuf Timestamp."""
    made = Timestamp()
    made.FromDatetime(time)
    return made
