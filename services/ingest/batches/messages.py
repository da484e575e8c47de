"""Conversion of batches to messages of shoal.ingest.v1."""

from __future__ import annotations

from datetime import datetime

from services.ingest.batches.batch import BatchState, Format, seconds_of
from services.ingest.batches.batch_control import BatchView
from services.ingest.messages import filter_state, timestamp_of
from shoal.ingest.v1 import ingest_pb2 as pb

_STATES = {state: f"BATCH_STATE_{state.name}" for state in BatchState}
_STATE_OF = {pb.BatchState.Value(name): state for state, name in _STATES.items()}
_FORMATS = {kind: f"BATCH_FORMAT_{kind.name}" for kind in Format}


def message_of(view: BatchView, now: datetime) -> pb.Batch:
    """Return the message of a batch."""
    batch, totals = view.batch, view.totals
    seconds = seconds_of(batch, now)
    message = pb.Batch(
        id=batch.id,
        state=_STATES[batch.state],
        inputs=batch.inputs,
        output=batch.output,
        format=_FORMATS[batch.format],
        model_name=batch.model_name,
        model_version=batch.model_version,
        columns=dict(batch.columns),
        tenant=batch.tenant,
        idempotency_key=batch.key,
        labels=dict(batch.labels),
        files=batch.files,
        rows=totals.rows,
        is_planned=batch.is_planned,
        rows_ok=totals.ok,
        rows_failed=totals.failed,
        chunks=totals.chunks,
        chunks_done=totals.chunks_done,
        parts_bytes=totals.nbytes,
        failures=[pb.BatchFailures(code=code, rows=rows) for code, rows in totals.codes.items()],
        model_versions=totals.versions,
        submitted_at=timestamp_of(batch.submitted_at),
        updated_at=timestamp_of(batch.updated_at),
        seconds=seconds,
        rows_per_second=(totals.ok + totals.failed) / seconds,
        message=batch.message,
        waits_for=batch.note or totals.note,
        ending=_STATES[batch.ending.state] if batch.ending is not None else pb.BATCH_STATE_UNSPECIFIED,
        transitions=[
            pb.BatchTransition(
                state=_STATES[step.state], at=timestamp_of(step.at), instance=step.instance, reason=step.reason
            )
            for step in batch.steps
        ],
    )
    if batch.ended_at is not None:
        message.ended_at.CopyFrom(timestamp_of(batch.ended_at))
    return message


def state_of(number: int) -> BatchState | None:
    """Return the state of a filter; None for unspecified.

    Raises:
        InvalidArgument: the number is not a state.
    """
    return filter_state("batch", number, _STATE_OF)
