"""Metrics in Prometheus' text format and in OpenMetrics.

Formats: https://prometheus.io/docs/instrumenting/exposition_formats/ and https://prometheus.io/docs/specs/om/open_metrics_spec/.
Prometheus' own library takes longer for a page of 500 models, and from a thread it shares the interpreter with calls.
Here a page is written on the event loop, in pieces that leave it time for calls. `?name[]=NAME&name[]=...` asks for
these families only.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, repeat
from types import MappingProxyType
from typing import TypeAlias
from urllib.parse import parse_qs

from mesh.metrics.endpoint import OPENMETRICS, Endpoint, Handler, Request, Response
from mesh.metrics.families import LABEL_CHARS, Family, Kind, Reading, Source
from mesh.metrics.histogram import Buckets, Exemplar
from mesh.metrics.snapshot import read

KEPT_S = 1.0
"""Time for which a page is given again: however many ask, a page of 500 models is made once a second at most."""
_KEPT = 8
"""Pages with different families that are kept."""
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_1 = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_OF_HELP = str.maketrans({"\\": r"\\", "\n": r"\n"})


Wanted: TypeAlias = Callable[[str], bool]


def wanted(query: str) -> Wanted | None:
    """Return a function that returns True for the families of a request, by their names on the page; None: for all.

    As for other exporters, each `name[]` is one name. One that ends in `*` stands for all names that begin so.
    """
    names = parse_qs(query).get("name[]")
    if names is None:
        return None
    exact, begins = frozenset(names), tuple(name[:-1] for name in names if name.endswith("*"))
    return lambda name: name in exact or name.startswith(begins)


class PageWriter:
    """Text of a page, written reading by reading. The series of a family stand together."""

    def __init__(self, *, is_openmetrics: bool = False, wanted: Wanted | None = None) -> None:
        self._is_openmetrics = is_openmetrics
        self._wanted = wanted
        # By family: the name of its series, and their lines.
        self._families: dict[Family, tuple[str, list[str]]] = {}

    def add(self, reading: Reading) -> None:
        """Write the series of a reading."""
        family, labels, value = reading
        name, lines = self._families.get(family) or self._head(family)
        if not name:
            return
        text = ",".join(
            f'{label}="{given[:LABEL_CHARS].translate(_ESCAPES)}"'
            for label, given in zip(family.labels, labels, strict=True)
        )
        if isinstance(value, Buckets):
            comma = "," if text else ""
            *bounded, total = accumulate(value.counts)
            # Only OpenMetrics has exemplars.
            exemplars = [_exemplar(each) for each in value.exemplars] if self._is_openmetrics else ()
            *of_bounded, of_total = exemplars or repeat("", len(value.counts))
            for bound, count, exemplar in zip(value.bounds, bounded, of_bounded, strict=True):
                lines.append(f'{name}_bucket{{{text}{comma}le="{bound!r}"}} {count}.0{exemplar}\n')
            of_all = f"{{{text}}}" if text else ""
            lines.append(
                f'{name}_bucket{{{text}{comma}le="+Inf"}} {total}.0{of_total}\n'
                f"{name}_count{of_all} {total}.0\n{name}_sum{of_all} {_number(value.sum)}\n"
            )
        else:
            lines.append(f"{name}{{{text}}} {_number(value)}\n" if text else f"{name} {_number(value)}\n")

    def _head(self, family: Family) -> tuple[str, list[str]]:
        name = named = family.prometheus
        kind: str = family.kind
        if family.kind is Kind.COUNTER and family.verbatim:
            # A counter's name ends in `_total`; another server's names are kept.
            kind = "unknown" if self._is_openmetrics else "untyped"
        elif family.kind is Kind.COUNTER:
            name = f"{named}_total"
            # In OpenMetrics, the family of a counter has the name without the suffix.
            named = named if self._is_openmetrics else name
        if self._wanted is not None and not self._wanted(name):
            found = self._families[family] = ("", [])
            return found
        help = family.help.translate(_ESCAPES if self._is_openmetrics else _OF_HELP)
        found = self._families[family] = (name, [f"# HELP {named} {help}\n# TYPE {named} {kind}\n"])
        return found

    def page(self) -> tuple[bytes, str]:
        """Return the page, and its content type."""
        body = "".join(line for _, lines in self._families.values() for line in lines)
        if self._is_openmetrics:
            return f"{body}# EOF\n".encode(errors="replace"), OPENMETRICS_1
        return body.encode(errors="replace"), TEXT


def _exemplar(exemplar: Exemplar | None) -> str:
    if exemplar is None:
        return ""
    ids = f'trace_id="{exemplar.trace_id:032x}",span_id="{exemplar.span_id:016x}"'
    return f" # {{{ids}}} {exemplar.value!r} {exemplar.at_s:.3f}"


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def page(readings: Iterable[Reading], *, is_openmetrics: bool = False) -> tuple[bytes, str]:
    """Return the text of readings in Prometheus' format or in OpenMetrics, and its content type."""
    writer = PageWriter(is_openmetrics=is_openmetrics)
    for reading in readings:
        writer.add(reading)
    return writer.page()


def metrics_endpoint(
    listen: str,
    sources: Sequence[Source],
    names: Collection[str] = (),
    pages: Mapping[str, Handler] = MappingProxyType({}),
) -> Endpoint:
    """Return the endpoint of a page of metrics, `/metrics`, and of other pages. One page of metrics is made at once."""
    turn = asyncio.Lock()
    made: dict[tuple[bool, str], tuple[float, Response]] = {}

    async def metrics(request: Request) -> Response:
        is_openmetrics = OPENMETRICS in request.headers.get("accept", "")
        async with turn:
            at, response = made.get((is_openmetrics, request.query), (-math.inf, None))
            if response is None or time.monotonic() - at >= KEPT_S:
                if len(made) >= _KEPT:
                    made.clear()
                writer = PageWriter(is_openmetrics=is_openmetrics, wanted=wanted(request.query))
                await read(sources, writer.add)
                body, content_type = writer.page()
                response = Response(200, content_type, body)
                made[is_openmetrics, request.query] = time.monotonic(), response
            return response

    return Endpoint(listen, {"/metrics": metrics, **pages}, names)
