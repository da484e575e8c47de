"""Spans of calls that were not sampled and have failed or were slow (tail sampling), kept for `shoal trace`.

    call ends ──OK, in less than SLOW_S──> nothing
              ──FAILURES, or slower──> keep ──its tenant has spans left in this second──> KeptSpans
                                         └──> the trace's id, which the caller receives as TRACE_KEY

The end of a call decides, in each process by itself. Processes agree on the trace when the caller has sent one, sampled
or not. Otherwise the process that fails first chooses it, and the processes that called it take it over from the error.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

from mesh.process import telemetry
from mesh.rpc.access import Access, tenant_of
from mesh.rpc.fast_spans import is_sampled, parsed_traceparent
from mesh.rpc.interceptors import FAILURES, UNTRACED
from shoal.errors import Code

SLOW_S = 1.0
"""A call that took longer is slow; one of a model with `slo_ms`, when it took longer than that."""

Attributes = Mapping[str, str | int | float]
NO_ATTRIBUTES: Attributes = MappingProxyType({})
MODEL, MODEL_VERSION = "shoal.model", "shoal.version"
QUEUE_MS, COMPUTE_MS = "shoal.queue_ms", "shoal.compute_ms"


def failed(
    path: str,
    headers: Mapping[bytes, bytes],
    access: Access | None,
    code: int,
    message: str,
    *,
    seconds: float,
    attributes: Attributes = NO_ATTRIBUTES,
    cause: str = "",
) -> str:
    """Keep the span of a call of `path` that failed after `seconds`. Return its trace; an empty text: it has none.

    Args:
        code: gRPC status. Those that are the caller's doing leave no span: the message says all.
        cause: trace of the call that made this one fail. It is returned also when this one leaves no span.
    """
    if code not in FAILURES:
        return ""
    about = {**attributes, "rpc.grpc.status_code": code}
    return _keep(path, headers, access, seconds, message or Code(code).name, about, cause) or cause


def slow(
    path: str,
    headers: Mapping[bytes, bytes],
    access: Access | None,
    seconds: float,
    attributes: Attributes = NO_ATTRIBUTES,
) -> str:
    """Keep the span of a call that succeeded after `seconds`. Return its trace; an empty text: the span is not kept."""
    return _keep(path, headers, access, seconds, "", attributes, "")


def _keep(
    path: str,
    headers: Mapping[bytes, bytes],
    access: Access | None,
    seconds: float,
    error: str,
    attributes: Attributes,
    cause: str,
) -> str:
    if path.startswith(UNTRACED):
        return ""
    return keep(
        path.lstrip("/"),
        headers.get(b"traceparent", b""),
        tenant_of(access, headers),
        seconds=seconds,
        error=error,
        attributes={"rpc.system": "grpc", **attributes},
        cause=cause,
    )


def keep(
    name: str,
    traceparent: bytes,
    tenant: str,
    *,
    seconds: float,
    error: str,
    attributes: Attributes,
    cause: str = "",
) -> str:
    """Keep the span of an operation that ends now after `seconds`. Return its trace; an empty text: it is not kept.

    Not kept are those of a sampled trace, whose spans were made when they began, and those beyond the tenant's rate.
    Without a `traceparent`, the span belongs to the trace `cause`, if there is one, or else to a new one.
    """
    kept = telemetry.kept_spans()
    if kept is None or (kept.has_all_roots if not traceparent else is_sampled(traceparent)):
        return ""
    # A flood of failures costs no more than this.
    if not kept.tail.admits(tenant):
        return ""
    parent = parsed_traceparent(traceparent)
    trace_id = cause or f"{random.getrandbits(128) or 1:032x}" if parent is None else f"{parent[0]:032x}"
    kept.add_tail(
        name,
        trace_id=trace_id,
        span_id=f"{random.getrandbits(64) or 1:016x}",
        parent="" if parent is None else f"{parent[1]:016x}",
        seconds=seconds,
        tenant=tenant,
        error=error,
        attributes=attributes,
    )
    return trace_id
