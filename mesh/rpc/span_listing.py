"""SpanService, by which coord reads the spans that a process keeps; and the bounds of an answer.

client ──GetSpans──> coord ──ListSpans──> SpanService of each process of the node
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from mesh.metrics.spans import select
from mesh.process import telemetry
from mesh.process.kept_spans import TENANT, KeptSpans
from mesh.rpc.interceptors import Context
from shoal.access.rpc_groups import LIST_SPANS
from shoal.coord.v1 import coord_pb2 as pb

SPANS, BYTES = 2_000, 2 << 20
"""Bounds of an answer: the latest spans."""


def methods() -> Mapping[str, Any]:
    """Return the methods of SpanService for the server of a process, by path; none in one that keeps no spans.

    Only services of the mesh may be able to reach them: an answer has the spans of every tenant.
    """
    kept = telemetry.kept_spans()
    return {} if kept is None else {LIST_SPANS: _handler(kept)}


def _handler(kept: KeptSpans) -> Any:
    async def list_spans(request: pb.ListSpansRequest, context: Context) -> pb.ListSpansResponse:
        chosen = select(kept, request.trace, request.job)
        if request.HasField("tenant"):
            chosen = [span for span in chosen if span["attributes"].get(TENANT) == request.tenant]
        spans, is_truncated = latest(map(message_of, chosen))
        return pb.ListSpansResponse(spans=spans, truncated=is_truncated)

    return grpc.unary_unary_rpc_method_handler(
        list_spans, pb.ListSpansRequest.FromString, pb.ListSpansResponse.SerializeToString
    )


def message_of(span: Mapping[str, Any]) -> pb.Span:
    """Return a kept span as a message."""
    attributes = {name: str(value) for name, value in span["attributes"].items()}
    return pb.Span(**{**span, "attributes": attributes})


def latest(spans: Iterable[pb.Span]) -> tuple[list[pb.Span], bool]:
    """Return the latest spans that fit into an answer, in the order of their starts, and True when there are more."""
    ordered = sorted(spans, key=lambda span: span.start_ns, reverse=True)
    chosen: list[pb.Span] = []
    size = 0
    for span in ordered[:SPANS]:
        size += span.ByteSize()
        if size > BYTES:
            break
        chosen.append(span)
    return chosen[::-1], len(chosen) < len(ordered)
