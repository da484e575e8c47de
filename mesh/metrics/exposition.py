"""Metrics in Prometheus' text format and in OpenMetrics, written by Prometheus' own library."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UntypedMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics

from mesh.metrics.endpoint import Endpoint, Request, Response
from mesh.metrics.families import LABEL_CHARS, Family, Kind, Reading, Source
from mesh.metrics.histogram import Buckets
from mesh.metrics.snapshot import snapshot

KEPT_S = 1.0
"""Time for which a page is given again: however many ask, a page of 500 models takes a thread for a second at most."""
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class _Collector:
    """Collector as Prometheus' library reads it."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        families: dict[Family, Metric] = {}
        for family, labels, value in self._readings:
            metric = families.get(family)
            if metric is None:
                metric = families[family] = _metric(family)
            _add(metric, [label[:LABEL_CHARS] for label in labels], value)
        yield from families.values()


def _metric(family: Family) -> Metric:
    name = family.prometheus
    if family.verbatim and family.kind is Kind.COUNTER:
        # The library gives a counter the suffix `_total`.
        return UntypedMetricFamily(name, family.help, labels=family.labels)
    match family.kind:
        case Kind.COUNTER:
            return CounterMetricFamily(name, family.help, labels=family.labels)
        case Kind.GAUGE:
            return GaugeMetricFamily(name, family.help, labels=family.labels)
        case Kind.HISTOGRAM:
            return HistogramMetricFamily(name, family.help, labels=family.labels)


def _add(metric: Metric, labels: list[str], value: float | Buckets) -> None:
    if isinstance(value, Buckets):
        assert isinstance(metric, HistogramMetricFamily)
        cumulated = list(accumulate(value.counts))
        bounds = [*(repr(bound) for bound in value.bounds), "+Inf"]
        metric.add_metric(labels, list(zip(bounds, map(float, cumulated), strict=True)), value.sum)
    else:
        assert isinstance(metric, CounterMetricFamily | GaugeMetricFamily | UntypedMetricFamily)
        metric.add_metric(labels, value)


def page(readings: Iterable[Reading], accept: str = "") -> tuple[bytes, str]:
    """Return the text of readings, and its content type, by the header `Accept` of the request.

    It is called in a thread: the text of 500 models and 10,000 tenants takes most of a second.
    """
    collector: Any = _Collector(readings)
    if "application/openmetrics-text" in accept:
        return openmetrics.generate_latest(collector), OPENMETRICS
    return exposition.generate_latest(collector), TEXT


def metrics_endpoint(listen: str, sources: Sequence[Source], names: Collection[str] = ()) -> Endpoint:
    """Return the endpoint of a page of metrics, `/metrics`. One page at a time is made, in a thread."""
    turn = asyncio.Lock()
    made: dict[bool, tuple[float, Response]] = {}

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        form = "application/openmetrics-text" in accept
        async with turn:
            at, response = made.get(form, (-math.inf, None))
            if response is None or time.monotonic() - at >= KEPT_S:
                body, content_type = await asyncio.to_thread(page, await snapshot(sources), accept)
                response = Response(200, content_type, body)
                made[form] = time.monotonic(), response
            return response

    return Endpoint(listen, {"/metrics": metrics}, names)
