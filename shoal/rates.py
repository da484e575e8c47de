"""Rates, percentiles and gauges by model, execution, tenant or instance, from a node's pages of metrics. Pure.

    page of metrics ──Counters──> Change since the page before ──models, executions, tenants, instances──> rows

`shoal top` does it with the pages of one node, and the leading coord with those of all nodes, for its history.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

Key = tuple[str, ...]
Labels = tuple[tuple[str, str], ...]
Samples = Mapping[str, Mapping[Labels, float]]

PAGE = (
    *("shoal_process_up", "shoal_process_restarts_total", "process_memory_usage_bytes"),
    *("process_cpu_time_seconds_total", "shoal_event_loop_stalls_total", "shoal_connection_memory_tenant_bytes"),
    *("shoal_infer_requests_total", "shoal_infer_request_duration_seconds", "shoal_infer_shed_total"),
    *("shoal_infer_expired_total", "shoal_infer_queue_depth", "shoal_infer_queue_age_seconds"),
    *("shoal_infer_model_ready", "shoal_infer_tenant_requests_total", "nv_inference_count", "nv_inference_exec_count"),
    *("shoal_ingest_jobs_ended_total", "shoal_ingest_queue_age_seconds"),
    *("envoy_http_*", "envoy_cluster_upstream_rq_xx"),
)
"""Families of the page that rows of models, tenants and instances need, as `name[]` of a request for `/metrics`."""
EXECUTIONS = ("shoal_infer_batch_size", "shoal_infer_compute_duration_seconds", "shoal_infer_queue_duration_seconds")
"""Families that rows of executions need besides PAGE."""
SERIES = 200_000
"""Most counters of a node that `shoal top` follows and that are not 0: those of 500 busy models with 4 instances."""
NO_ANSWER = " (no answer)"
"""End of the name of an instance that has not answered."""

_GAUGES = frozenset(
    (
        *("shoal_process_up", "process_memory_usage_bytes", "shoal_connection_memory_tenant_bytes"),
        *("shoal_infer_queue_depth", "shoal_infer_queue_age_seconds", "shoal_infer_model_ready"),
        "shoal_ingest_queue_age_seconds",
    )
)
_RESTARTS = "shoal_process_restarts_total"
_READY = "shoal_infer_model_ready"
# A tenant without requests between the pages has a row, too.
_TENANTS = "shoal_infer_tenant_requests_total"
# A node puts the labels `service` and `instance` first. The page of a single process has neither.
_SERIES = re.compile(
    r'^([a-zA-Z_:][\w:]*)(?:\{(?:service="([^"]*)",instance="([^"]*)",?)?(.*)\})? (\S+)$', re.MULTILINE
)
# The begin of a word is looked for once: a malformed page may have a word of megabytes.
_LABEL = re.compile(r'(?<!\w)(\w++)="((?:[^"\\]|\\.)*)"')
_OF_MODEL = re.compile(r'model="(?:[^"\\]|\\.)*",version="[^"]*"')
_ESCAPED = re.compile(r"\\(.)")


@dataclass(slots=True)
class Page:
    """Values by name of the sample, and by labels."""

    samples: Samples

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


def parse(text: str) -> Page:
    """Return the values of a page in Prometheus' text format. Raises ValueError when the text is none."""
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    for name, service, instance, labels, number in _SERIES.findall(text):
        samples[name][_labels(service, instance, labels)] = float(number)
    if not samples:
        raise ValueError("no metrics")
    return Page(samples)


@dataclass(frozen=True, slots=True)
class Change:
    """Growth of counters between two pages, and the gauges of the second one."""

    seconds: float
    grown: Page
    """Counters that have grown, by how much."""
    now: Page
    calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Requests that the node's Envoy has sent to an instance between the pages, and those that failed for it."""


class Counters:
    """The counters of one node, as its pages had them last. Those at 0, most of an idle model's, take no memory."""

    def __init__(self) -> None:
        self.series = SERIES
        """Most counters that are followed and are not 0. The others have no growth."""
        self._at: float | None = None
        # By instance, and by series without the labels `service` and `instance`.
        self._last: dict[str, dict[str, float]] = {}
        self._restarts: dict[str, float] = {}
        # Models of each instance on the last page, as labels.
        self._models: dict[str, set[str]] = {}
        # True: the last page had more counters than are followed. One that is new may have been left out there.
        self._is_cut = False

    def take(self, text: str, at: float) -> Change | None:
        """Return the change since the page before; None for the first one.

        A counter that is smaller than before, or whose process was restarted, has grown from 0. One of a process that
        did not answer is compared with the process's last answer. The first answer of a process is no growth. Neither
        are the counts of a model that was not there before: one that is loaded again goes on with its own.

        Args:
            text: the page, in Prometheus' text format.
            at: seconds, on a monotonic clock.

        Raises:
            ValueError: the text is not a page of metrics.
        """
        lines = _SERIES.findall(text)
        if not lines:
            raise ValueError("no metrics")
        restarts = {instance: float(number) for name, _, instance, _, number in lines if name == _RESTARTS}
        last, kept, count = self._last, dict[str, dict[str, float]](), 0
        grown: dict[str, dict[Labels, float]] = defaultdict(dict)
        now: dict[str, dict[Labels, float]] = defaultdict(dict)
        models: dict[str, set[str]] = defaultdict(set)
        series = ("", "", "", "")
        for name, service, instance, labels, number in lines:
            if name in _GAUGES:
                now[name][_labels(service, instance, labels)] = float(number)
                if name == _READY:
                    models[instance].add(labels)
                continue
            if name == _RESTARTS:
                continue
            known, mine = last.get(instance), kept.setdefault(instance, {})
            value = float(number)
            if name == _TENANTS:
                now[name][_labels(service, instance, labels)] = value
            lower, series = series, (name, service, instance, labels)
            if not value > 0 or count >= self.series:
                continue
            key = f"{name}{{{labels}"
            mine[key], count = value, count + 1
            if known is None or (key not in known and self._is_new(instance, labels)):
                continue
            earlier = known.get(key, 0.0) if restarts.get(instance) == self._restarts.get(instance) else 0.0
            if value != earlier:
                by = value - earlier if value > earlier else value
                if name.endswith("_bucket") and lower[0] == name:
                    # Its bound is the lower one of the first bucket that has grown.
                    grown[name].setdefault(_labels(*lower[1:]), 0.0)
                grown[name][_labels(*series[1:])] = by
        silent = last.keys() & restarts.keys() - kept.keys()
        self._last = kept | {instance: last[instance] for instance in silent}
        self._restarts = {each: (self._restarts if each in silent else restarts).get(each, 0.0) for each in restarts}
        self._models = models | {instance: self._models.get(instance, set()) for instance in silent}
        self._is_cut = count >= self.series
        before, self._at = self._at, at
        return None if before is None else Change(max(at - before, 1e-9), Page(grown), Page(now))

    def _is_new(self, instance: str, labels: str) -> bool:
        """Return True for a counter whose value is not known to have been 0 on the last page."""
        of_model = _OF_MODEL.match(labels)
        return self._is_cut or (of_model is not None and of_model[0] not in self._models.get(instance, ()))


def _labels(service: str, instance: str, text: str) -> Labels:
    found = [
        (name, _ESCAPED.sub(_unescaped, value) if "\\" in value else value) for name, value in _LABEL.findall(text)
    ]
    return (("service", service), ("instance", instance), *found) if instance else tuple(found)


def _unescaped(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


def merged(changes: Mapping[str, Change], seconds: float) -> Change:
    """Return the changes of several nodes as one of this length; each series has the label `node`."""
    grown: dict[str, dict[Labels, float]] = defaultdict(dict)
    now: dict[str, dict[Labels, float]] = defaultdict(dict)
    for node, change in changes.items():
        scale = seconds / change.seconds
        for page, into, factor in ((change.grown, grown, scale), (change.now, now, 1.0)):
            for name, series in page.samples.items():
                into[name].update({(("node", node), *labels): value * factor for labels, value in series.items()})
    return Change(seconds, Page(grown), Page(now))


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


def models(change: Change) -> list[Row]:
    """Return a row for each version of a model."""
    seconds, grown, now = change.seconds, change.grown, change.now
    ended = grown.by("shoal_infer_requests_total", (*MODEL, "outcome"))
    durations = _percentiles_ms(change, "shoal_infer_request_duration_seconds")
    rows_run = grown.by("nv_inference_count", MODEL)
    executions = grown.by("nv_inference_exec_count", MODEL)
    shed = grown.by("shoal_infer_shed_total", MODEL)
    expired = grown.by("shoal_infer_expired_total", MODEL)
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


def executions(change: Change) -> list[Row]:
    """Return a row for each version of a model: how often it ran, with how many rows, and what requests waited for it.

    Percentiles `p50_ms` and `p99_ms` are those of the model's own time.
    """
    seconds, grown, now = change.seconds, change.grown, change.now
    ran = grown.by("shoal_infer_batch_size_count", MODEL)
    rows_run = grown.by("shoal_infer_batch_size_sum", MODEL)
    compute = _percentiles_ms(change, "shoal_infer_compute_duration_seconds")
    queue = _percentiles_ms(change, "shoal_infer_queue_duration_seconds")
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


def _percentiles_ms(change: Change, name: str) -> dict[Key, tuple[float | None, float | None]]:
    """Return the 50th and the 99th percentile of a histogram, by version of a model."""
    bounds: dict[Key, dict[float, float]] = defaultdict(dict)
    for (*key, bound), count in change.grown.by(f"{name}_bucket", (*MODEL, "le")).items():
        # The page of another node may be of any form.
        with suppress(ValueError):
            bounds[tuple(key)][float(bound)] = count

    def ms(of: Mapping[float, float], share: float) -> float | None:
        value = percentile(of, share)
        return None if value is None else value * 1_000

    return {key: (ms(of, 0.5), ms(of, 0.99)) for key, of in bounds.items()}


def _failed_at_envoy(change: Change) -> float:
    """Return how many requests have failed at Envoy between the pages, at least.

    Its answer to a gRPC call has the HTTP status 200: such an error is in the counts of clusters (no instance answers,
    an instance broke off, time over) or of filters (callers, limits), and one of REST also in those of the listener.
    """
    grown = change.grown
    classes = grown.by("envoy_http_downstream_rq_xx", ("envoy_response_code_class",))
    clusters = grown.by("envoy_cluster_upstream_rq_xx", ("envoy_response_code_class",)).get(("5",), 0.0)
    refused = sum(
        grown.sum(name)
        for name in grown.samples
        if name.startswith("envoy_http_") and name.endswith(("_denied", "_rate_limited"))
    )
    return max(classes.get(("4",), 0.0), refused) + max(classes.get(("5",), 0.0), clusters)


def instances(change: Change) -> list[Row]:
    """Return a row for each process of the node.

    A request has failed when its instance counts it so, or the node's Envoy: one without an answer is in Envoy's count
    alone.
    """
    seconds, grown, now = change.seconds, change.grown, change.now
    cpu = grown.by("process_cpu_time_seconds_total", INSTANCE)
    stalls = grown.by("shoal_event_loop_stalls_total", INSTANCE)
    memory = now.by("process_memory_usage_bytes", INSTANCE)
    ended = grown.by("shoal_infer_requests_total", (*INSTANCE, "outcome"))
    jobs = grown.by("shoal_ingest_jobs_ended_total", INSTANCE)
    calls = grown.by("envoy_http_downstream_rq_total", (*INSTANCE, "envoy_http_conn_manager_prefix"))
    waiting = now.by("shoal_infer_queue_depth", INSTANCE)
    found = []
    for (name,), is_up in sorted(now.by("shoal_process_up", INSTANCE).items()):
        good, bad = ended.get((name, "success"), 0.0), ended.get((name, "failure"), 0.0)
        total = good + bad + jobs.get((name,), 0.0) + calls.get((name, "gateway"), 0.0)
        share = bad / (good + bad) if good + bad else 0.0
        if name == "envoy" and (all_calls := sum(count for key, count in calls.items() if key[0] == name)):
            share = min(1.0, _failed_at_envoy(change) / all_calls)
        sent, failed = change.calls.get(name, (0, 0))
        found.append(
            Row(
                name=name if is_up else name + NO_ANSWER,
                rate=total / seconds,
                errors=max(share, min(1.0, failed / sent) if sent else float(failed > 0)),
                queue=waiting.get((name,), 0.0),
                cpu=cpu.get((name,), 0.0) / seconds if (name,) in memory else None,
                memory_bytes=memory.get((name,)),
                stalls=stalls.get((name,), 0.0),
            )
        )
    return found


def tenants(change: Change) -> list[Row]:
    """Return a row for each tenant that has a series of its own; the others are one row."""
    seconds, grown, now = change.seconds, change.grown, change.now
    ended = grown.by(_TENANTS, ("tenant",))
    ages = now.most("shoal_ingest_queue_age_seconds", ("tenant",))
    held = now.by("shoal_connection_memory_tenant_bytes", ("tenant",))
    known = now.by(_TENANTS, ("tenant",))
    return [
        Row(
            name=key[0] or "(none)",
            rate=ended.get(key, 0.0) / seconds,
            queue_age_s=max(0.0, ages.get(key, 0.0)),
            memory_bytes=held.get(key, 0.0),
        )
        for key in sorted(known.keys() | ages.keys() | held.keys())
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
