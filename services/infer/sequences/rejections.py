"""Rejections of sequence steps, in Triton's words where it has them."""

from __future__ import annotations

from services.infer.error_text import quoted
from services.infer.sequences.rows import SequenceId
from shoal.errors import InvalidArgument, ResourceExhausted


def unknown(model: str, id: SequenceId, idle_s: float) -> InvalidArgument:
    """Return the error of a step of an unknown sequence, without the START flag."""
    which = quoted(id) if isinstance(id, str) else str(id)
    return InvalidArgument(
        f"inference request for sequence {which} to model '{model}' must specify the START flag on the first request "
        "of the sequence: it is not known here; it was not started, its start failed, it has ended, it was idle for "
        f"more than {idle_s:g} s, or the replica that had it was lost: start it again"
    )


def without_id(model: str) -> InvalidArgument:
    """Return the error of a request without a sequence id."""
    return InvalidArgument(f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID")


def too_many_rows(model: str, rows: int) -> InvalidArgument:
    """Return the error of a step with several rows."""
    return InvalidArgument(
        f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence batcher, "
        f"got {rows}"
    )


def no_memory(model: str) -> ResourceExhausted:
    """Return the error of a step whose new states find no room. It has run: it says no time to retry."""
    return ResourceExhausted(
        f"no memory is left for the state of this sequence of model '{model}': it keeps that of its last successful "
        "step; end sequences that are not used any more, or ask the operator for a higher SHOAL_INFER_STATE_BYTES"
    )
