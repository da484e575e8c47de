"""Server spans of the fast path, without the tracing API: a finished span is handed to the exporter.

    FastCall begins ──> FastTracer.begin: sampled? no ──> None, nothing else is done
                                                yes ──> FastSpan ──FastCall ends──> FastTracer.end ──> exporter's queue

Starting a span through the SDK costs 30 us, more than the whole call. Here an unsampled call pays for one look-up of a
header and one random number. The spans, their names and attributes are those of the slow path (mesh.rpc.interceptors).

Format of the header: https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from mesh.process.kept_spans import TENANT
from mesh.process.telemetry import Exporting, Sampling, exporting
from mesh.rpc.interceptors import PATH
from shoal.errors import Code

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LENGTH = 55
_LOW_64 = (1 << 64) - 1
# The last hexadecimal digit of the flags of a caller's span that is not sampled.
_EVEN = frozenset(b"02468ace")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("shoal")
_FAULTS = frozenset({Code.INTERNAL, Code.DATA_LOSS, Code.UNKNOWN})


class FastSpan:
    """A sampled call: its ids and its start. `parent` is None for the first span of a trace."""

    __slots__ = ("context", "parent", "start_ns")

    def __init__(self, context: SpanContext, parent: SpanContext | None, start_ns: int) -> None:
        self.context = context
        self.parent = parent
        self.start_ns = start_ns

    def current(self) -> AbstractContextManager[object]:
        """Return a context manager that makes the span the current one, for logs and outgoing calls."""
        return trace.use_span(trace.NonRecordingSpan(self.context))

    @property
    def trace_id(self) -> str:
        """The trace, as 32 hexadecimal digits."""
        return f"{self.context.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """The header that makes another span a child of this one."""
        return f"00-{self.trace_id}-{self.context.span_id:016x}-01"


class FastTracer:
    """Decides which fast calls are sampled, and hands their finished spans to the exporter."""

    def __init__(
        self,
        export: Callable[[ReadableSpan], None],
        resource: Resource,
        sampling: Sampling,
        seed: int | None = None,
        admits: Callable[[], bool] | None = None,
    ) -> None:
        """Store the parts. `seed` is for tests: otherwise the ids are the system's random numbers.

        `admits` returns True when a span may be made for one more call of a sampled trace; None: always.
        """
        self._admits = admits
        self._export = export
        self._resource = resource
        self._follows_parent = sampling.follows_parent
        self._bound = round(sampling.ratio * (1 << 64))
        self._bits = random.Random(seed).getrandbits

    @classmethod
    def of_process(cls) -> FastTracer | None:
        """Return the tracer of a process that exports or keeps spans; None in any other."""
        found: Exporting | None = exporting()
        return None if found is None else cls(found.export, found.resource, found.sampling, admits=found.admits)

    def begin(self, headers: Mapping[bytes, bytes]) -> FastSpan | None:
        """Return the span of a call with these headers; None when the call is not sampled."""
        given = headers.get(b"traceparent")
        if given is None or len(given) < _LENGTH:
            return self._root()
        if self._follows_parent:
            # Not validated further: these are nearly all calls, and a regular expression would double their cost.
            return None if given[_LENGTH - 1] in _EVEN else self._child(headers, given)
        # Samplers that ignore the parent decide by the trace's id, as the SDK's do.
        parent = parsed_traceparent(given)
        if parent is None:
            return self._root()
        return self._child(headers, given) if parent[0] & _LOW_64 < self._bound else None

    def _root(self) -> FastSpan | None:
        if not self._bound:
            return None
        low = self._bits(64)
        if low >= self._bound:
            return None
        trace_id = self._bits(64) << 64 | low or 1
        return FastSpan(SpanContext(trace_id, self._bits(64) or 1, False, _SAMPLED), None, time.time_ns())

    def _child(self, headers: Mapping[bytes, bytes], given: bytes) -> FastSpan | None:
        parent = parsed_traceparent(given)
        if parent is None:
            return self._root()
        if self._admits is not None and not self._admits():
            return None
        state = TraceState()
        if (text := headers.get(b"tracestate")) is not None:
            state = TraceState.from_header([text.decode("latin-1")])
        trace_id, span_id, flags = parent
        caller = SpanContext(trace_id, span_id, True, TraceFlags(flags), state)
        return FastSpan(SpanContext(trace_id, self._bits(64) or 1, False, _SAMPLED, state), caller, time.time_ns())

    def end(self, span: FastSpan, path: str, code: int = 0, message: str = "", tenant: str = "") -> None:
        """Export the span of a call of `path` (`/package.Service/Method`) that ended with the gRPC status `code`."""
        attributes: dict[str, str | int] = {"rpc.system": "grpc", PATH: "fast"}
        if tenant:
            attributes[TENANT] = tenant
        status = Status(StatusCode.UNSET)
        if code:
            attributes["rpc.grpc.status_code"] = code
            if code in _FAULTS:
                status = Status(StatusCode.ERROR, message)
        self._export(
            ReadableSpan(
                path.lstrip("/"),
                span.context,
                span.parent,
                self._resource,
                attributes,
                kind=SpanKind.SERVER,
                status=status,
                start_time=span.start_ns,
                end_time=time.time_ns(),
                instrumentation_scope=_SCOPE,
            )
        )


def parent_of(headers: Mapping[bytes, bytes]) -> str:
    """Return the caller's `traceparent` header when it is valid, else an empty text."""
    given = headers.get(b"traceparent", b"")
    return given[:_LENGTH].decode() if parsed_traceparent(given) is not None else ""


def is_sampled(traceparent: bytes) -> bool:
    """Return True when the header says that the caller's span is sampled. It is not validated."""
    return len(traceparent) >= _LENGTH and traceparent[_LENGTH - 1] not in _EVEN


def parsed_traceparent(given: bytes) -> tuple[int, int, int] | None:
    """Return the trace id, span id and flags of a `traceparent` header; None when it is invalid."""
    match = _TRACEPARENT.fullmatch(given)
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[5]):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    return (trace_id, span_id, int(match[4], 16)) if trace_id and span_id else None
