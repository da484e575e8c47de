"""Trace context of a job as a string (https://www.w3.org/TR/trace-context/#traceparent-header)."""

from __future__ import annotations

from opentelemetry import propagate
from opentelemetry.context import Context


def traceparent_of(context: Context | None = None) -> str:
    """Return the traceparent of `context`, or of the current context; empty when there is no trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return carrier.get("traceparent", "")
