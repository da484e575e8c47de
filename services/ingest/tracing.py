"""Traces as jobs carry them: one line of text (https://www.w3.org/TR/trace-context/#traceparent-header)."""

from __future__ import annotations

from opentelemetry import propagate
from opentelemetry.context import Context


def traceparent_of(context: Context | None = None) -> str:
    """The trace of `context`, or of the caller when there is none given; empty when it is in no trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return carrier.get("traceparent", "")
