"""Families of metrics: the declaration of a metric, apart from its values.

Names are OpenTelemetry's (dots, a unit in UCUM's notation). The name in Prometheus follows from them, by the rules of
https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/: underscores, the unit as a suffix,
and `_total` for a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from mesh.metrics.histogram import Buckets

LABEL_CHARS = 128
"""Longest value of a label, in characters: names of models and tenants are callers' choice."""


class Kind(StrEnum):
    """Kind of a metric."""

    COUNTER = "counter"
    """Grows from the start of the process."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_UNITS = {"s": "seconds", "By": "bytes", "1": "ratio", "ms": "milliseconds", "us": "microseconds"}


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, with all its series."""

    name: str
    """Name in OpenTelemetry: `shoal.infer.request.duration`."""
    kind: Kind
    unit: str
    """UCUM: `s`, `By`, `1`, `{request}`."""
    help: str
    labels: tuple[str, ...] = ()
    verbatim: bool = False
    """True: `name` is the name in Prometheus, too, for dashboards of another server."""

    @property
    def prometheus(self) -> str:
        """Name in Prometheus, without the `_total` that a counter gets."""
        if self.verbatim:
            return self.name
        base = self.name.replace(".", "_")
        suffix = _UNITS.get(self.unit, "")
        # A ratio is a gauge's unit; a counter of unit 1 has none.
        if not suffix or (self.unit == "1" and self.kind is not Kind.GAUGE) or base.endswith(f"_{suffix}"):
            return base
        return f"{base}_{suffix}"


Value: TypeAlias = float | Buckets
Reading: TypeAlias = tuple[Family, Sequence[str], Value]
"""A series of a family: its label values, in the order of the family's labels, and its value."""
Source: TypeAlias = Callable[[], Iterable[Reading]]
"""Reads a part of the metrics, on the event loop: it takes a few milliseconds at most. Text is made in a thread."""
