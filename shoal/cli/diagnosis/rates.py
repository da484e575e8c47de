"""Rates, percentiles and gauges by model, tenant or instance, from two pages of a node's metrics. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, ...]


@dataclass(slots=True)
class Page:
    """One page of metrics: values by name of the sample, and by labels."""

    at: float
    """Seconds, on any clock."""
    samples: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]

    def by(self, name: str, labels: Sequence[str]) -> dict[Key, float]:
        """Return the sums of a sample's values by these labels."""
        sums: dict[Key, float] = defaultdict(float)
        for series, value in self.samples.get(name, {}).items():
            found = dict(series)
            sums[tuple(found.get(label, "") for label in labels)] += value
        return sums

    def most(self, name: str, labels: Sequence[str]) -> dict[Key, float]:
        """Return the largest of a sample's values by these labels."""
        found: dict[Key, float] = {}
        for series, value in self.samples.get(name, {}).items():
            key = tuple(dict(series).get(label, "") for label in labels)
            found[key] = max(found.get(key, value), value)
        return found


def parse(text: str, at: float) -> Page:
    """Return the page of a text in Prometheus' format. Raises ValueError when it is none."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return Page(at, samples)


@dataclass(slots=True)
class Row:
    """Figures of one model, tenant or instance between two pages."""

    name: str
    rate: float = 0.0
    """Requests a second that have ended; for a tenant also."""
    errors: float = 0.0
    """Share of them that failed."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    batch: float | None = None
    """Mean rows of an execution."""
    queue: float = 0.0
    """Requests that wait now; jobs, for a tenant."""
    queue_age_s: float = 0.0
    """Age of the oldest of them."""
    shed: float = 0.0
    """Requests a second that were rejected or evicted, or expired."""
    cpu: float | None = None
    """Share of one processor; for an instance."""
    memory_bytes: float | None = None
    stalls: float = 0.0
    """Event loop stalls between the pages; for an instance."""
    rates: list[float] = field(default_factory=list)
    """Rates of earlier pairs of pages, oldest first, with this one."""


MODEL = ("model", "version")
INSTANCE = ("instance",)
_DURATION = "shoal_infer_request_duration_seconds"


def _growth(before: Page, now: Page, name: str, labels: Sequence[str]) -> dict[Key, float]:
    """Return by how much a counter has grown. One that restarted counts from zero."""
    earlier = before.by(name, labels)
    return {
        key: value - earlier.get(key, 0.0) if value >= earlier.get(key, 0.0) else value
        for key, value in now.by(name, labels).items()
    }


def percentile(bounds: Mapping[float, float], share: float) -> float | None:
    """Return a percentile, interpolated within a bucket, from cumulative counts by upper bound; None without counts."""
    ordered = sorted(bounds.items())
    total = ordered[-1][1] if ordered else 0.0
    if total <= 0:
        return None
    wanted, lower, below = share * total, 0.0, 0.0
    for bound, count in ordered:
        if count >= wanted:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below) if count > below else bound
        lower, below = bound, count
    return lower


def models(before: Page, now: Page) -> list[Row]:
    """Return a row for each version of a model."""
    seconds = max(now.at - before.at, 1e-9)
    ended = _growth(before, now, "shoal_infer_requests_total", (*MODEL, "outcome"))
    counts = _growth(before, now, f"{_DURATION}_bucket", (*MODEL, "le"))
    rows_run = _growth(before, now, "nv_inference_count", MODEL)
    executions = _growth(before, now, "nv_inference_exec_count", MODEL)
    shed = _growth(before, now, "shoal_infer_shed_total", MODEL)
    expired = _growth(before, now, "shoal_infer_expired_total", MODEL)
    waiting, age = now.by("shoal_infer_queue_depth", MODEL), now.most("shoal_infer_queue_age_seconds", MODEL)
    found = []
    for key in sorted(now.by("shoal_infer_model_ready", MODEL)):
        good, bad = ended.get((*key, "success"), 0.0), ended.get((*key, "failure"), 0.0)
        bounds = {float(series[-1]): count for series, count in counts.items() if series[:-1] == key}
        p50, p99 = percentile(bounds, 0.5), percentile(bounds, 0.99)
        found.append(
            Row(
                name=f"{key[0]} {key[1]}",
                rate=(good + bad) / seconds,
                errors=bad / (good + bad) if good + bad else 0.0,
                p50_ms=None if p50 is None else p50 * 1_000,
                p99_ms=None if p99 is None else p99 * 1_000,
                batch=rows_run.get(key, 0.0) / executions[key] if executions.get(key) else None,
                queue=waiting.get(key, 0.0),
                queue_age_s=age.get(key, 0.0),
                shed=(shed.get(key, 0.0) + expired.get(key, 0.0)) / seconds,
            )
        )
    return found


def instances(before: Page, now: Page) -> list[Row]:
    """Return a row for each process of the node."""
    seconds = max(now.at - before.at, 1e-9)
    cpu = _growth(before, now, "process_cpu_time_seconds_total", INSTANCE)
    stalls = _growth(before, now, "shoal_event_loop_stalls_total", INSTANCE)
    memory = now.by("process_memory_usage_bytes", INSTANCE)
    ended = _growth(before, now, "shoal_infer_requests_total", (*INSTANCE, "outcome"))
    jobs = _growth(before, now, "shoal_ingest_jobs_ended_total", INSTANCE)
    calls = _growth(before, now, "envoy_http_downstream_rq_total", (*INSTANCE, "envoy_http_conn_manager_prefix"))
    waiting = now.by("shoal_infer_queue_depth", INSTANCE)
    found = []
    for (name,), is_up in sorted(now.by("shoal_process_up", INSTANCE).items()):
        good, bad = ended.get((name, "success"), 0.0), ended.get((name, "failure"), 0.0)
        total = good + bad + jobs.get((name,), 0.0) + calls.get((name, "gateway"), 0.0)
        found.append(
            Row(
                name=name if is_up else f"{name} (no answer)",
                rate=total / seconds,
                errors=bad / (good + bad) if good + bad else 0.0,
                queue=waiting.get((name,), 0.0),
                cpu=cpu[(name,)] / seconds if (name,) in cpu else None,
                memory_bytes=memory.get((name,)),
                stalls=stalls.get((name,), 0.0),
            )
        )
    return found


def tenants(before: Page, now: Page) -> list[Row]:
    """Return a row for each tenant that has a series of its own; the others are one row."""
    seconds = max(now.at - before.at, 1e-9)
    ended = _growth(before, now, "shoal_infer_tenant_requests_total", ("tenant",))
    ages = now.most("shoal_ingest_queue_age_seconds", ("tenant",))
    return [
        Row(name=key[0] or "(none)", rate=ended.get(key, 0.0) / seconds, queue_age_s=max(0.0, ages.get(key, 0.0)))
        for key in sorted(ended.keys() | ages.keys())
    ]


SORTS: Mapping[str, str] = {
    "name": "name",
    "rate": "rate",
    "p99": "p99_ms",
    "errors": "errors",
    "queue": "queue",
    "age": "queue_age_s",
    "batch": "batch",
    "shed": "shed",
    "cpu": "cpu",
    "memory": "memory_bytes",
    "stalls": "stalls",
}
"""Fields by which rows are sorted, by their names in the command line."""


def ordered(rows: Iterable[Row], sort: str) -> list[Row]:
    """Return the rows in the order of a field: names ascending, numbers descending."""
    by_name = sorted(rows, key=lambda row: row.name)
    if sort == "name":
        return by_name
    return sorted(by_name, key=lambda row: -(getattr(row, SORTS[sort]) or 0.0))
