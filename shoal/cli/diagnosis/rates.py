"""Rates, percentiles and gauges by model, execution, tenant or instance, from two pages of a node's metrics. Pure."""

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
    endpoints: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Requests that the node's Envoy has sent to an instance, and how many of them failed for it."""

    def has(self, name: str) -> bool:
        """Return True when the page has a series of the sample."""
        return bool(self.samples.get(name))

    def sum(self, name: str) -> float:
        """Return the sum of all series of the sample; 0 without one."""
        return self.by(name, ()).get((), 0.0)

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
    """Figures of one model, its executions, a tenant or an instance between two pages."""

    name: str
    rate: float = 0.0
    """Requests a second that have ended; for executions, executions a second."""
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
    """Resident memory of an instance; for a tenant, what its open requests hold."""
    stalls: float = 0.0
    """Event loop stalls between the pages; for an instance."""
    queue_p50_ms: float | None = None
    """Time that requests waited for an execution; for executions."""
    queue_p99_ms: float | None = None
    rates: list[float] = field(default_factory=list)
    """Rates of earlier pairs of pages, oldest first, with this one."""


MODEL = ("model", "version")
INSTANCE = ("instance",)


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
    durations = _percentiles_ms(before, now, "shoal_infer_request_duration_seconds")
    rows_run = _growth(before, now, "nv_inference_count", MODEL)
    executions = _growth(before, now, "nv_inference_exec_count", MODEL)
    shed = _growth(before, now, "shoal_infer_shed_total", MODEL)
    expired = _growth(before, now, "shoal_infer_expired_total", MODEL)
    waiting, age = now.by("shoal_infer_queue_depth", MODEL), now.most("shoal_infer_queue_age_seconds", MODEL)
    found = []
    for key in sorted(now.by("shoal_infer_model_ready", MODEL)):
        good, bad = ended.get((*key, "success"), 0.0), ended.get((*key, "failure"), 0.0)
        p50, p99 = durations.get(key, (None, None))
        found.append(
            Row(
                name=f"{key[0]} {key[1]}",
                rate=(good + bad) / seconds,
                errors=bad / (good + bad) if good + bad else 0.0,
                p50_ms=p50,
                p99_ms=p99,
                batch=rows_run.get(key, 0.0) / executions[key] if executions.get(key) else None,
                queue=waiting.get(key, 0.0),
                queue_age_s=age.get(key, 0.0),
                shed=(shed.get(key, 0.0) + expired.get(key, 0.0)) / seconds,
            )
        )
    return found


def executions(before: Page, now: Page) -> list[Row]:
    """Return a row for each version of a model: how often it ran, with how many rows, and what requests waited for it.

    Percentiles `p50_ms` and `p99_ms` are those of the model's own time.
    """
    seconds = max(now.at - before.at, 1e-9)
    ran = _growth(before, now, "shoal_infer_batch_size_count", MODEL)
    rows_run = _growth(before, now, "shoal_infer_batch_size_sum", MODEL)
    compute = _percentiles_ms(before, now, "shoal_infer_compute_duration_seconds")
    queue = _percentiles_ms(before, now, "shoal_infer_queue_duration_seconds")
    waiting, age = now.by("shoal_infer_queue_depth", MODEL), now.most("shoal_infer_queue_age_seconds", MODEL)
    found = []
    for key in sorted(now.by("shoal_infer_model_ready", MODEL)):
        p50, p99 = compute.get(key, (None, None))
        queue_p50, queue_p99 = queue.get(key, (None, None))
        found.append(
            Row(
                name=f"{key[0]} {key[1]}",
                rate=ran.get(key, 0.0) / seconds,
                batch=rows_run.get(key, 0.0) / ran[key] if ran.get(key) else None,
                p50_ms=p50,
                p99_ms=p99,
                queue_p50_ms=queue_p50,
                queue_p99_ms=queue_p99,
                queue=waiting.get(key, 0.0),
                queue_age_s=age.get(key, 0.0),
            )
        )
    return found


def _percentiles_ms(before: Page, now: Page, name: str) -> dict[Key, tuple[float | None, float | None]]:
    """Return the 50th and the 99th percentile of a histogram, by version of a model."""
    bounds: dict[Key, dict[float, float]] = defaultdict(dict)
    for (*key, bound), count in _growth(before, now, f"{name}_bucket", (*MODEL, "le")).items():
        bounds[tuple(key)][float(bound)] = count

    def ms(of: Mapping[float, float], share: float) -> float | None:
        value = percentile(of, share)
        return None if value is None else value * 1_000

    return {key: (ms(of, 0.5), ms(of, 0.99)) for key, of in bounds.items()}


def _failed_at_envoy(before: Page, now: Page) -> float:
    """Return how many requests have failed at Envoy between the pages, at least.

    Its answer to a gRPC call has the HTTP status 200: such an error is in the counts of clusters (no instance answers,
    an instance broke off, time over) or of filters (callers, limits), and one of REST also in those of the listener.
    """

    def grown(name: str, *labels: str) -> dict[Key, float]:
        return _growth(before, now, name, labels)

    classes = grown("envoy_http_downstream_rq_xx", "envoy_response_code_class")
    clusters = grown("envoy_cluster_upstream_rq_xx", "envoy_response_code_class").get(("5",), 0.0)
    refused = sum(
        value
        for name in now.samples
        if name.startswith("envoy_http_") and name.endswith(("_denied", "_rate_limited"))
        for value in grown(name).values()
    )
    return max(classes.get(("4",), 0.0), refused) + max(classes.get(("5",), 0.0), clusters)


def instances(before: Page, now: Page) -> list[Row]:
    """Return a row for each process of the node.

    A request has failed when its instance counts it so, or the node's Envoy: one without an answer is in Envoy's count
    alone.
    """
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
        share = bad / (good + bad) if good + bad else 0.0
        if name == "envoy" and (all_calls := sum(count for key, count in calls.items() if key[0] == name)):
            share = min(1.0, _failed_at_envoy(before, now) / all_calls)
        sent, failed = (
            max(0, last - first)
            for last, first in zip(now.endpoints.get(name, (0, 0)), before.endpoints.get(name, (0, 0)), strict=True)
        )
        found.append(
            Row(
                name=name if is_up else f"{name} (no answer)",
                rate=total / seconds,
                errors=max(share, min(1.0, failed / sent) if sent else float(failed > 0)),
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
    held = now.by("shoal_connection_memory_tenant_bytes", ("tenant",))
    return [
        Row(
            name=key[0] or "(none)",
            rate=ended.get(key, 0.0) / seconds,
            queue_age_s=max(0.0, ages.get(key, 0.0)),
            memory_bytes=held.get(key, 0.0),
        )
        for key in sorted(ended.keys() | ages.keys() | held.keys())
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
