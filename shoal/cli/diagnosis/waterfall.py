"""Waterfall of the spans of a trace, as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BAR = 24
"""Characters of the longest bar."""
_NAMES = (
    *("shoal.job", "shoal.attempt", "shoal.results", "shoal.tenant", "shoal.model", "shoal.queue_ms"),
    *("shoal.compute_ms", "rpc.grpc.status_code", "shoal.path"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One span of a waterfall."""

    offset_ms: float
    """Begin, after the first span of the trace."""
    bar: str
    duration_ms: float
    instance: str
    name: str
    """Indented below its parent."""
    about: str
    """Attributes, and the error."""
    has_failed: bool


def lines(spans: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return a line for each span: below its parent, in the order of their begins.

    Spans whose parent is not among them, such as the caller's, are roots. A span that is there twice is one.
    """
    known = {span["span"]: span for span in spans}
    if not known:
        return []
    begin = min(span["start_ns"] for span in known.values())
    length = max(max(span["end_ns"] for span in known.values()) - begin, 1)
    children: dict[str, list[Mapping[str, Any]]] = {}
    for span in sorted(known.values(), key=lambda span: (span["start_ns"], -span["end_ns"])):
        children.setdefault(span["parent"] if span["parent"] in known else "", []).append(span)
    found: list[Line] = []
    # Depth first. A span that is its own ancestor is never reached.
    waiting = [(span, 0) for span in reversed(children.get("", ()))]
    while waiting:
        span, depth = waiting.pop()
        found.append(_line(span, depth, begin, length))
        waiting += [(child, depth + 1) for child in reversed(children.get(span["span"], ()))]
    return found


def _line(span: Mapping[str, Any], depth: int, begin: int, length: int) -> Line:
    first = (span["start_ns"] - begin) * BAR // length
    last = max(first + 1, (span["end_ns"] - begin) * BAR // length)
    first = min(first, BAR - 1)
    about = [f"{name.rpartition('.')[2]}={span['attributes'][name]}" for name in _NAMES if name in span["attributes"]]
    if span["error"]:
        about.append(span["error"])
    return Line(
        offset_ms=(span["start_ns"] - begin) / 1e6,
        bar=" " * first + "█" * (min(last, BAR) - first) + " " * (BAR - min(last, BAR)),
        duration_ms=(span["end_ns"] - span["start_ns"]) / 1e6,
        instance=span["instance"].rpartition("/")[2],
        name="  " * min(depth, 8) + span["name"].rpartition(".")[2],
        about="  ".join(about),
        has_failed=bool(span["error"]),
    )
