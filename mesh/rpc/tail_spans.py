"""Spans of calls that were not sampled and have failed or were slow (tail sampling), kept for `shoal trace`.

    call ends ──OK, in less than SLOW_S──> nothing
              ──FAILURES, or slower──> keep ──its tenant has spans left in this second──> KeptSpans
                                         └──> the trace's id, which the caller receives as TRACE_KEY

The end of a call decides, in each process by itself. Processes agree on the trace when the caller has sent one, sampled
or not. Otherwise the process that fails first chooses it, and its callers take it over from the error.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

from mesh.process import telemetry
from mesh.process.kept_spans import KeptSpans
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
    trace_id: str = "",
) -> str:
    """Keep the span of a call of `path` that failed after `seconds`; return its trace, or an empty text: not kept.

    Args:
        code: gRPC status. Those that are the caller's doing leave no span: the message says all.
        trace_id: the trace of the call whose failure is the cause.
    """
    if code not in FAILURES:
        return ""
    return _keep(path, headers, access, seconds, code, message, attributes, trace_id)


def slow(
    path: str,
    headers: Mapping[bytes, bytes],
    access: Access | None,
    seconds: float,
    attributes: Attributes = NO_ATTRIBUTES,
) -> str:
    """Keep the span of a call that succeeded after `seconds`; return its trace, or an empty text: not kept."""
    return _keep(path, headers, access, seconds, 0, "", attributes)


def _keep(
    path: str,
    headers: Mapping[bytes, bytes],
    access: Access | None,
    seconds: float,
    code: int,
    message: str,
    attributes: Attributes,
    trace_id: str = "",
) -> str:
    if path.startswith(UNTRACED):
        return ""
    given, tenant = headers.get(b"traceparent", b""), tenant_of(access, headers)
    kept = _admitting(given, tenant)
    # A flood of failures costs no more than this.
    if kept is None:
        return ""
    about: dict[str, str | int | float] = {"rpc.system": "grpc", **attributes}
    if code:
        about["rpc.grpc.status_code"] = code
    error = (message or Code(code).name) if code else ""
    return _add(kept, path.lstrip("/"), given, tenant, seconds, error, about, trace_id)


def keep(
    name: str,
    traceparent: bytes,
    tenant: str,
    *,
    seconds: float,
    error: str,
    attributes: Attributes,
    trace_id: str = "",
) -> str:
    """Keep the span of an operation that ends now; return its trace, or an empty text: not kept.

    Not kept are those of a sampled trace, whose spans were made when they began, and those beyond the tenant's rate.
    """
    kept = _admitting(traceparent, tenant)
    return "" if kept is None else _add(kept, name, traceparent, tenant, seconds, error, attributes, trace_id)


def _admitting(traceparent: bytes, tenant: str) -> KeptSpans | None:
    """Return the memory for one more span of a tenant, counted; None when it takes none."""
    kept = telemetry.kept_spans()
    if kept is None or (kept.has_all_roots if not traceparent else is_sampled(traceparent)):
        return None
    return kept if kept.tail.admits(tenant) else None


def _add(
    kept: KeptSpans,
    name: str,
    traceparent: bytes,
    tenant: str,
    seconds: float,
    error: str,
    attributes: Attributes,
    trace_id: str,
) -> str:
    parent = parsed_traceparent(traceparent)
    if parent is not None:
        trace_id = f"{parent[0]:032x}"
    elif not trace_id:
        trace_id = f"{random.getrandbits(128) or 1:032x}"
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
