"""Real Triton and Shoal get the same requests over REST: statuses and bodies are the same, or are listed."""

from __future__ import annotations

import http.client
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.infer.conformance.instance import Instance
from tests.infer.triton import differences, rest_cases
from tests.infer.triton.differences import Difference
from tests.infer.triton.rest_cases import RestCase
from tests.infer.triton.triton_process import Triton

CASES = rest_cases.every()
PATIENCE_S = 60

Seen = tuple[int, Any]
"""Status; headers that matter, JSON and raw bytes of a good response, or that there is an error."""


@pytest.fixture(scope="session")
def known_in_rest(repository_root: Path) -> list[Difference]:
    """Differences that docs/compatibility.md lists."""
    return differences.listed(repository_root / "docs/compatibility.md", rest=True)


def see(address: str, case: RestCase) -> Seen:
    """Make the request, and return what a client makes of the response."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request(case.method, case.path, case.body or None, dict(case.headers))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        assert set(json.loads(body)) == {"error"}, body
        return response.status, "error"
    kind = response.headers.get("Content-Type", "").partition(";")[0]
    length = response.headers.get("Inference-Header-Content-Length")
    if kind == "text/event-stream":
        return 200, [plain(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event.strip()]
    encoding = response.headers.get("Content-Encoding")
    if encoding:
        body = zlib.decompress(body, 47 if encoding == "gzip" else 15)
    if not body:
        return 200, ""
    head, raw = (body, b"") if length is None else (body[: int(length)], body[int(length) :])
    return 200, [kind, plain(head), raw]


def plain(text: bytes) -> Any:
    """Return JSON without what is each server's own: the order of members, and of rows of an index."""
    # Triton writes BYTES as they are.
    found = json.loads(text.decode(errors="surrogateescape"), parse_float=rounded, parse_constant=str)
    if isinstance(found, list):
        return sorted(found, key=lambda row: (row["name"], row["version"]))
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        found.get("parameters", {}).pop(name, None)
    if found.get("parameters") == {}:
        del found["parameters"]
    if isinstance(found.get("versions"), list):
        found["versions"].sort()
    return found


def rounded(number: str) -> float:
    """Return a number with as many digits as FP32 has: Shoal writes the shortest that mean the same value."""
    value = float(number)
    return value if math.isinf(value) else float(f"{value:.7g}")


@pytest.mark.parametrize("name", CASES)
def test_case(triton_served: Triton, shoal_process: Instance, known_in_rest: list[Difference], name: str) -> None:
    case = CASES[name]
    triton, shoal = see(triton_served.http, case), see(shoal_process.address, case)
    rows = [row for row in known_in_rest if row.covers(name)]
    assert len(rows) <= 1, f"'{name}' is listed more than once"
    if not rows:
        assert triton == shoal, f"'{name}' differs, and is not listed:\n  Triton {triton}\n  Shoal  {shoal}"
        return
    assert triton != shoal, f"'{name}' is listed as a difference, but is none any more: {shoal}"
    assert (triton[0], shoal[0]) == (int(rows[0].triton), int(rows[0].shoal)), f"'{name}':\n  {triton}\n  {shoal}"


def test_every_listed_difference_is_one_of_a_case(known_in_rest: list[Difference]) -> None:
    assert known_in_rest
    for row in known_in_rest:
        for pattern in row.cases:
            alone = Difference((pattern,), row.triton, row.shoal, row.why)
            assert any(alone.covers(case) for case in CASES), f"'{pattern}' is the name of no case"
