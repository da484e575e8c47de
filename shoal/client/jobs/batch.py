"""Batch: files of rows that go through one model, and their state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from shoal.client.models.registry import of_time
from shoal.ingest.v1 import ingest_pb2 as ingest

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_KNOWN_STATES = {number: name for name, number in ingest.BatchState.items()}
_KNOWN_FORMATS = {number: name for name, number in ingest.BatchFormat.items()}


class BatchState(StrEnum):
    """State of a batch; RUNNING and PAUSED are the states of a batch that has not ended."""

    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    """Every row was run; some rows may have failed, but not all."""
    FAILED = "failed"
    """An input or the output is at fault, or every row failed: see `message`."""
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """A state that this version of the client does not know."""

    @property
    def ended(self) -> bool:
        """True for final states."""
        return self not in (BatchState.RUNNING, BatchState.PAUSED, BatchState.UNKNOWN)


class BatchFormat(StrEnum):
    """Format of a batch's inputs."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    NPZ = "npz"
    OBJECTS = "objects"
    """A prefix: each object below it is a row with the columns `content` (the object's bytes) and `url`."""


@dataclass(frozen=True)
class BatchStep:
    """One transition of a batch."""

    state: BatchState
    at: datetime | None
    instance: str
    """The ingest instance that made the transition."""
    reason: str


@dataclass(frozen=True)
class Batch:
    """Snapshot of a batch at the time of the call."""

    id: str
    state: BatchState
    inputs: tuple[str, ...]
    output: str
    format: str
    model_name: str
    model_version: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column for each input of the model."""
    tenant: str = ""
    idempotency_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    files: int = 0
    rows: int = 0
    """Rows planned so far; the final number once `is_planned`."""
    is_planned: bool = False
    rows_ok: int = 0
    rows_failed: int = 0
    chunks: int = 0
    chunks_done: int = 0
    parts_bytes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    """Rows that failed, by status code."""
    model_versions: tuple[str, ...] = ()
    """Versions that have run rows."""
    submitted_at: datetime | None = None
    updated_at: datetime | None = None
    ended_at: datetime | None = None
    seconds: float = 0.0
    """Time from submit to end, or to now; pauses excluded."""
    rows_per_second: float = 0.0
    message: str = ""
    """Reason of a failure or cancellation."""
    waits_for: str = ""
    """Unavailable dependency that the batch is waiting for; empty when there is none."""
    transitions: tuple[BatchStep, ...] = ()
    """All transitions so far, oldest first."""
    ending: BatchState | None = None
    """Final state that the batch is about to take; None when it is not ending."""

    @property
    def ended(self) -> bool:
        """True in a final state."""
        return self.state.ended

    @property
    def rows_done(self) -> int:
        """Rows that succeeded or failed."""
        return self.rows_ok + self.rows_failed


def to_url(place: str | Path) -> str:
    """Return `place` as a URL: URLs unchanged, local paths as `file:///...`; folders get a trailing slash."""
    text = str(place)
    if _URL.match(text):
        return text
    path = Path(text).expanduser().absolute()
    is_folder = text.endswith("/") or path.is_dir()
    return path.as_uri() + ("/" if is_folder else "")


def of_batch(message: ingest.Batch) -> Batch:
    """Return the Batch of a message."""
    return Batch(
        id=message.id,
        state=_state(message.state),
        inputs=tuple(message.inputs),
        output=message.output,
        format=_KNOWN_FORMATS.get(message.format, "").removeprefix("BATCH_FORMAT_").lower(),
        model_name=message.model_name,
        model_version=message.model_version,
        columns=dict(message.columns),
        tenant=message.tenant,
        idempotency_key=message.idempotency_key,
        labels=dict(message.labels),
        files=message.files,
        rows=message.rows,
        is_planned=message.is_planned,
        rows_ok=message.rows_ok,
        rows_failed=message.rows_failed,
        chunks=message.chunks,
        chunks_done=message.chunks_done,
        parts_bytes=message.parts_bytes,
        failures={each.code: each.rows for each in message.failures},
        model_versions=tuple(message.model_versions),
        submitted_at=of_time(message, "submitted_at"),
        updated_at=of_time(message, "updated_at"),
        ended_at=of_time(message, "ended_at"),
        seconds=message.seconds,
        rows_per_second=message.rows_per_second,
        message=message.message,
        waits_for=message.waits_for,
        transitions=tuple(
            BatchStep(_state(step.state), of_time(step, "at"), step.instance, step.reason)
            for step in message.transitions
        ),
        ending=_state(message.ending) if message.ending else None,
    )


def _state(number: int) -> BatchState:
    try:
        return BatchState(_KNOWN_STATES.get(number, "").removeprefix("BATCH_STATE_").lower())
    except ValueError:
        return BatchState.UNKNOWN
