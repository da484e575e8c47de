"""MongoDB documents of batches and chunks, in two collections.

`free_at` is set while work remains: from that time on, an instance may claim it. A lease is a `free_at` that its holder
keeps moving ahead. When a batch ends, its chunks are deleted, and its document has their sums. The document is kept for
the retention (`keep_batches_ms`, or the tenant's rule).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bson import Binary
from pymongo import ASCENDING, DESCENDING, IndexModel

from mesh.mongo import Document
from services.ingest.batches.batch import (
    FINAL,
    Batch,
    BatchState,
    BatchStep,
    Chunk,
    ChunkState,
    Ending,
    Format,
    Totals,
)
from services.ingest.batches.inputs.locations import Entry
from services.ingest.batches.inputs.piece import Span
from services.ingest.batches.rows.signature import Signature, TensorSpec
from services.ingest.job import Lease

BATCHES = "batches"
CHUNKS = "batch_chunks"

BATCH_INDEXES = (
    IndexModel(
        [("is_active", ASCENDING), ("_id", ASCENDING)],
        name="active",
        partialFilterExpression={"is_active": {"$exists": True}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("is_active", ASCENDING)],
        name="active_of_tenant",
        partialFilterExpression={"is_active": {"$exists": True}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("key", ASCENDING)],
        name="idempotency",
        unique=True,
        partialFilterExpression={"key": {"$exists": True}},
    ),
    IndexModel([("state", ASCENDING), ("_id", DESCENDING)], name="by_state"),
    IndexModel([("model_name", ASCENDING), ("_id", DESCENDING)], name="by_model"),
    IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant"),
)
CHUNK_INDEXES = (
    IndexModel([("batch", ASCENDING), ("number", ASCENDING)], name="in_order", unique=True),
    # Unfinished chunks in their order; the index leaves out chunks that are done.
    IndexModel(
        [("batch", ASCENDING), ("number", ASCENDING), ("free_at", ASCENDING), ("state", ASCENDING)],
        name="undone",
        partialFilterExpression={"free_at": {"$exists": True}},
    ),
)
BATCH_VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "state", "inputs", "output", "format", "model_name", "tenant", "submitted_at", "steps"],
        "properties": {
            "_id": {"bsonType": "string", "minLength": 26, "maxLength": 26},
            "state": {"enum": [str(state) for state in BatchState]},
            "format": {"enum": [str(kind) for kind in Format]},
            "steps": {"bsonType": "array", "minItems": 1},
        },
    }
}
CHUNK_VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "batch", "number", "state", "entry", "span", "first"],
        "properties": {
            "state": {"enum": [str(state) for state in ChunkState]},
            "free_at": {"bsonType": "date"},
        },
    }
}


def batch_document(batch: Batch) -> Document:
    """Return the document of a batch."""
    document: Document = {
        "_id": batch.id,
        "state": str(batch.state),
        "inputs": list(batch.inputs),
        "output": batch.output,
        "format": str(batch.format),
        "model_name": batch.model_name,
        "model_version": batch.model_version,
        "signature": _signature(batch.signature),
        # Pairs, because a name may be any text, unlike a field name of MongoDB.
        "columns": [list(pair) for pair in batch.columns],
        "kept": Binary(batch.kept),
        "texts": list(batch.texts),
        "tenant": batch.tenant,
        "labels": [list(pair) for pair in batch.labels],
        "chunk_rows": batch.chunk_rows,
        "max_attempts": batch.max_attempts,
        "submitted_at": batch.submitted_at,
        "updated_at": batch.updated_at,
        "tries": batch.tries,
        "files": batch.files,
        "is_planned": batch.is_planned,
        "message": batch.message,
        "note": batch.note,
        "steps": [step_document(step) for step in batch.steps],
    }
    if batch.key:
        document |= {"key": batch.key, "digest": Binary(batch.digest)}
    if batch.caller:
        document["caller"] = Binary(batch.caller)
    if batch.state not in FINAL:
        document["is_active"] = True
    optional = {
        "free_at": batch.free_at,
        "lease": batch.lease and asdict(batch.lease),
        "listing": batch.listing and asdict(batch.listing),
        "ending": batch.ending and {"state": str(batch.ending.state), "reason": batch.ending.reason},
        "totals": batch.totals and totals_document(batch.totals),
        "ended_at": batch.ended_at,
    }
    return document | {name: value for name, value in optional.items() if value is not None}


def batch_of(document: Mapping[str, Any]) -> Batch:
    """Return the batch of a document."""
    lease, listing = document.get("lease"), document.get("listing")
    ending, totals = document.get("ending"), document.get("totals")
    return Batch(
        id=document["_id"],
        inputs=tuple(document.get("inputs", ())),
        output=document["output"],
        format=Format(document["format"]),
        model_name=document["model_name"],
        model_version=document["model_version"],
        signature=_signature_of(document["signature"]),
        columns=tuple((name, column) for name, column in document["columns"]),
        kept=bytes(document["kept"]),
        texts=tuple(document["texts"]),
        state=BatchState(document["state"]),
        tenant=document["tenant"],
        key=document.get("key", ""),
        digest=bytes(document.get("digest", b"")),
        labels=tuple((key, value) for key, value in document["labels"]),
        chunk_rows=document["chunk_rows"],
        max_attempts=document["max_attempts"],
        submitted_at=document["submitted_at"],
        updated_at=document["updated_at"],
        free_at=document.get("free_at"),
        lease=Lease(**lease) if lease else None,
        tries=document["tries"],
        listing=Entry(**listing) if listing else None,
        files=document["files"],
        is_planned=document["is_planned"],
        ending=Ending(BatchState(ending["state"]), ending["reason"]) if ending else None,
        totals=_totals_of(totals) if totals else None,
        ended_at=document.get("ended_at"),
        caller=bytes(document.get("caller", b"")),
        message=document["message"],
        note=document["note"],
        steps=tuple(
            BatchStep(BatchState(step["state"]), step["at"], step["instance"], step["reason"])
            for step in document["steps"]
        ),
    )


def chunk_document(chunk: Chunk) -> Document:
    """Return the document of a newly planned chunk."""
    return {
        "_id": chunk.id,
        "batch": chunk.batch,
        "number": chunk.number,
        "state": str(chunk.state),
        "entry": asdict(chunk.entry),
        "line": [chunk.line, chunk.line_end],
        "span": asdict(chunk.span),
        "first": chunk.first,
        "attempts": chunk.attempts,
        "free_at": chunk.free_at,
    }


def chunk_of(document: Mapping[str, Any]) -> Chunk:
    """Return the chunk of a document."""
    lease = document.get("lease")
    done = document.get("done") or {}
    return Chunk(
        batch=document["batch"],
        number=document["number"],
        entry=Entry(**document["entry"]),
        line=document["line"][0],
        line_end=document["line"][1],
        span=Span(**document["span"]),
        first=document["first"],
        state=ChunkState(document["state"]),
        free_at=document.get("free_at"),
        lease=Lease(**lease) if lease else None,
        attempts=document["attempts"],
        staged=document.get("staged", ""),
        ok=done.get("ok", 0),
        failed=done.get("failed", 0),
    )


def step_document(step: BatchStep) -> Document:
    """Return the subdocument of a transition."""
    return {"state": str(step.state), "at": step.at, "instance": step.instance, "reason": step.reason}


def totals_document(totals: Totals) -> Document:
    """Return the subdocument of a batch's counts."""
    return asdict(totals) | {
        "codes": [[code, count] for code, count in totals.codes.items()],
        "versions": list(totals.versions),
    }


def _totals_of(document: Mapping[str, Any]) -> Totals:
    fields = dict(document)
    fields |= {"codes": dict(document["codes"]), "versions": tuple(document["versions"])}
    return Totals(**fields)


def _signature(signature: Signature) -> Document:
    def specs(found: tuple[TensorSpec, ...]) -> list[Document]:
        return [asdict(spec) | {"shape": list(spec.shape)} for spec in found]

    return {
        "inputs": specs(signature.inputs),
        "outputs": specs(signature.outputs),
        "max_rows": signature.max_rows,
    }


def _signature_of(document: Mapping[str, Any]) -> Signature:
    def specs(found: list[Document]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in found)

    return Signature(specs(document["inputs"]), specs(document["outputs"]), document["max_rows"])
