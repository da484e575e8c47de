"""The page of a process's kept spans, for `shoal trace`: GET /spans?trace=ID or ?job=ID, as JSON.

Without a query: the latest spans of calls that failed or were slow.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs

from mesh.metrics.endpoint import Request, Response, text
from mesh.process.kept_spans import KeptSpans

PAGE = "/spans"
IDS = "expected a trace (8 to 32 hexadecimal digits), a job, or neither"
BAD_QUERY = text(400, f"?trace=ID, ?job=ID: {IDS}")
LATEST = 100
"""Spans of calls that failed or were slow, in an answer for no trace and no job."""
_TRACE = re.compile(r"[0-9a-f]{8,32}")
_JOB = re.compile(r"[0-9A-Za-z]{1,64}")


def is_valid(trace: str, job: str) -> bool:
    """Return True when not both are given, and the one that is given is an id."""
    if trace and job:
        return False
    return bool(_TRACE.fullmatch(trace)) if trace else not job or bool(_JOB.fullmatch(job))


def parsed(query: str) -> tuple[str, str] | None:
    """Return the trace and the job that the query of a request names, else empty; None for any other query."""
    fields = parse_qs(query, keep_blank_values=True)
    if any(len(values) != 1 or not values[0] for values in fields.values()) or fields.keys() - {"trace", "job"}:
        return None
    trace, job = (fields.get(name, [""])[0] for name in ("trace", "job"))
    return (trace, job) if is_valid(trace, job) else None


def select(kept: KeptSpans, trace: str, job: str) -> list[dict[str, Any]]:
    """Return the kept spans of a trace or of a job; for neither, the latest of calls that failed or were slow."""
    if trace:
        return kept.of_trace(trace)
    return kept.of_job(job) if job else kept.latest(LATEST)


class SpansPage:
    """Handler of the page."""

    def __init__(self, kept: KeptSpans) -> None:
        self._kept = kept

    async def __call__(self, request: Request) -> Response:
        query = parsed(request.query)
        if query is None:
            return BAD_QUERY
        return Response(200, "application/json", json.dumps(select(self._kept, *query)).encode())
