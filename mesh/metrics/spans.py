"""The page of a process's kept spans, for `shoal trace`: GET /spans?trace=ID or ?job=ID, as JSON."""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qs

from mesh.metrics.endpoint import Request, Response, text
from mesh.process.kept_spans import KeptSpans

PAGE = "/spans"
BAD_QUERY = text(400, "expected ?trace=ID (8 to 32 hexadecimal digits) or ?job=ID")
_TRACE = re.compile(r"[0-9a-f]{8,32}")
_JOB = re.compile(r"[0-9A-Za-z]{1,64}")


def asked(query: str) -> tuple[str, str] | None:
    """Return `trace` or `job` and the id, of the query of a request; None for any other query."""
    fields = parse_qs(query)
    for name, form in (("trace", _TRACE), ("job", _JOB)):
        values = fields.get(name, [])
        if len(fields) == 1 and len(values) == 1 and form.fullmatch(values[0]):
            return name, values[0]
    return None


class SpansPage:
    """Handler of the page."""

    def __init__(self, kept: KeptSpans) -> None:
        self._kept = kept

    async def __call__(self, request: Request) -> Response:
        wanted = asked(request.query)
        if wanted is None:
            return BAD_QUERY
        name, id = wanted
        found = self._kept.of_trace(id) if name == "trace" else self._kept.of_job(id)
        return Response(200, "application/json", json.dumps(found).encode())
