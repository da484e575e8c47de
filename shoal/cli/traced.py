"""A sampled trace around the calls of a command, and the command that shows it."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from shoal.errors import Code, ShoalError

# Errors whose text says all, or that no process of the node has seen.
_CLEAR = frozenset(
    {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNIMPLEMENTED}
)


@contextmanager
def traced(gateway: str | None) -> Iterator[str]:
    """Run calls in a sampled trace; yield the command that shows it, with the gateway that was given.

    A call that fails names the command on standard error.
    """
    trace_id = secrets.randbits(128) or 1
    parent = SpanContext(trace_id, secrets.randbits(64) or 1, False, TraceFlags(TraceFlags.SAMPLED))
    command = f"shoal trace {trace_id:032x}" + (f" --gateway {shlex.quote(gateway)}" if gateway else "")
    token = context.attach(trace.set_span_in_context(NonRecordingSpan(parent)))
    try:
        yield command
    except ShoalError as err:
        if err.code not in _CLEAR:
            typer.echo(f"trace: {command}", err=True)
            # Its command is named already.
            err.trace_id = ""
        raise
    finally:
        context.detach(token)
