"""`client.spans()`: the parts of calls that the processes of a node keep in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Timeout
from shoal.coord.v1 import coord_pb2 as coord


@dataclass(frozen=True)
class Span:
    """A finished part of a call in one process."""

    trace: str
    """The trace, as 32 hexadecimal digits."""
    span: str
    parent: str
    """The span that this one is a part of; empty for the first of a trace."""
    instance: str
    """The process: `<node>/<service>-<n>`."""
    name: str
    start_ns: int
    """Nanoseconds since 1970."""
    end_ns: int
    error: str
    """Text of the error; empty without one."""
    attributes: Mapping[str, str]
    links: tuple[str, ...]
    """Traces of other calls whose work the span did as well."""


@dataclass(frozen=True)
class Spans:
    """Kept spans, sorted by start."""

    spans: tuple[Span, ...]
    silent: tuple[str, ...]
    """Processes that did not answer: their spans are missing."""
    truncated: bool
    """True: there are more; these are the latest."""


async def fetch_spans(caller: Caller, trace: str, job: str, timeout_s: Timeout) -> Spans:
    """Return the spans of a trace or of a job; for neither, the latest of calls that failed or were slow."""
    request = coord.GetSpansRequest(trace=trace, job=job)
    found = await caller.call(methods.GET_SPANS, request, timeout_s=timeout_s)
    return Spans(tuple(map(_of_span, found.spans)), tuple(found.silent), found.truncated)


def _of_span(message: coord.Span) -> Span:
    return Span(
        trace=message.trace,
        span=message.span,
        parent=message.parent,
        instance=message.instance,
        name=message.name,
        start_ns=message.start_ns,
        end_ns=message.end_ns,
        error=message.error,
        attributes=dict(message.attributes),
        links=tuple(message.links),
    )
