"""Write the dashboards for Grafana, deploy/observability/dashboards/*.json.

    python tools/dashboards.py [--check]

With --check the script writes nothing, and exits with 1 when a file is stale. The tests run each expression against a
Prometheus that has scraped a loaded node. Model: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "observability" / "dashboards"
RATE = "$__rate_interval"
"""Variable of Grafana: a window that holds some scrapes."""
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3


@dataclass(frozen=True)
class Panel:
    """One graph: its queries, each with the legend of its series."""

    title: str
    unit: str
    """Unit of Grafana: `s`, `bytes`, `reqps`, `short`, `percentunit`."""
    help: str
    queries: tuple[tuple[str, str], ...]


def panel(title: str, unit: str, help: str, *queries: str) -> Panel:
    """Return a panel; a query is `expression | legend`."""
    pairs = (query.rpartition(" | ") for query in queries)
    return Panel(title, unit, help, tuple((expression, legend) for expression, _, legend in pairs))


def _percentiles(metric: str, by: str, legend: str) -> tuple[str, ...]:
    return tuple(
        f"histogram_quantile({share}, sum by (le, {by}) (rate({metric}_bucket[{RATE}]))) | {legend} p{share * 100:.0f}"
        for share in (0.5, 0.99)
    )


def _share_of_hour(part: str, whole: str) -> str:
    rates = (f"sum by (model, version) (rate(shoal_infer_{name}[1h]))" for name in (part, whole))
    return " / ".join(rates)


_OF_MODEL = "{{model}} {{version}}"
_OF_OUTCOME = "{{model}} {{version}} {{outcome}}"
_CLUSTER = "{{envoy_cluster_name}}"
_CLUSTER_CLASS = "{{envoy_cluster_name}} {{envoy_response_code_class}}xx"
REQUESTS = panel(
    "Requests",
    "reqps",
    "Requests a second that have ended, by outcome.",
    f"sum by (outcome) (rate(shoal_infer_requests_total[{RATE}])) | {{{{outcome}}}}",
)
JOBS_ENDED = panel(
    "Jobs that ended",
    "ops",
    "Ended jobs a second, by outcome.",
    f"sum by (outcome) (rate(shoal_ingest_jobs_ended_total[{RATE}])) | {{{{outcome}}}}",
)
OLDEST = panel(
    "Age of the oldest due job", "s", "0: no job is due.", "max(shoal_ingest_queue_oldest_seconds) | oldest due job"
)
MEMORY = panel("Memory", "bytes", "Resident memory of each process.", "process_memory_usage_bytes | {{instance}}")
PROCESSOR = panel(
    "Processor",
    "percentunit",
    "Processors in use, by process.",
    f"sum by (instance) (rate(process_cpu_time_seconds_total[{RATE}])) | {{{{instance}}}}",
)

DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": (
        "Shoal: overview",
        (
            REQUESTS,
            panel(
                "Time of requests",
                "s",
                "From arrival to outcome, of successful requests.",
                *_percentiles("shoal_infer_request_duration_seconds", "model", "{{model}}"),
            ),
            panel(
                "Responses of the gateway",
                "reqps",
                "By class of HTTP status. Errors of gRPC have the status 200.",
                "sum by (envoy_response_code_class) (rate(envoy_http_downstream_rq_xx"
                f'{{envoy_http_conn_manager_prefix="gateway"}}[{RATE}])) | {{{{envoy_response_code_class}}}}xx',
            ),
            JOBS_ENDED,
            OLDEST,
            panel("Processes that answer", "short", "By service.", "sum by (service) (shoal_process_up) | {{service}}"),
            MEMORY,
            PROCESSOR,
            panel("Leader", "short", "1: one coord leads.", "sum(shoal_coord_leader) | leaders"),
        ),
    ),
    "model": (
        "Shoal: models",
        (
            panel(
                "Requests",
                "reqps",
                "By model and outcome.",
                f"sum by (model, version, outcome) (rate(shoal_infer_requests_total[{RATE}])) | {_OF_OUTCOME}",
            ),
            panel(
                "Time of requests",
                "s",
                "From arrival to outcome, of successful requests.",
                *_percentiles("shoal_infer_request_duration_seconds", "model, version", _OF_MODEL),
            ),
            panel(
                "Time in the queue",
                "s",
                "Of successful requests.",
                *_percentiles("shoal_infer_queue_duration_seconds", "model, version", _OF_MODEL),
            ),
            panel(
                "Time of executions",
                "s",
                "The model's own time.",
                *_percentiles("shoal_infer_compute_duration_seconds", "model, version", _OF_MODEL),
            ),
            panel(
                "Batches held",
                "s",
                "For more requests, while an instance was free: a part of the time in the queue.",
                *_percentiles("shoal_infer_forming_duration_seconds", "model, version", _OF_MODEL),
            ),
            panel(
                "Copies of an execution",
                "s",
                "Inputs put together, and outputs split.",
                *_percentiles("shoal_infer_gather_duration_seconds", "model, version", f"{_OF_MODEL} in"),
                *_percentiles("shoal_infer_scatter_duration_seconds", "model, version", f"{_OF_MODEL} out"),
            ),
            panel(
                "Responses written",
                "s",
                "Those of an execution together; on the slow path, one.",
                *_percentiles("shoal_infer_serialise_duration_seconds", "model, version", _OF_MODEL),
            ),
            panel(
                "Rows of an execution",
                "short",
                "Mean size of batches.",
                f"sum by (model, version) (rate(shoal_infer_batch_size_sum[{RATE}])) / "
                f"sum by (model, version) (rate(shoal_infer_batch_size_count[{RATE}])) | {_OF_MODEL}",
            ),
            panel(
                "Executions",
                "ops",
                "A second.",
                f"sum by (model, version) (rate(shoal_infer_batch_size_count[{RATE}])) | {_OF_MODEL}",
            ),
            panel(
                "Queue",
                "short",
                "Requests that wait.",
                f"sum by (model, version) (shoal_infer_queue_depth) | {_OF_MODEL}",
            ),
            panel(
                "Age of the oldest request",
                "s",
                "Of those that wait.",
                f"max by (model, version) (shoal_infer_queue_age_seconds) | {_OF_MODEL}",
            ),
            panel(
                "Requests without an execution",
                "reqps",
                "Rejected or evicted, by reason, or expired.",
                f"sum by (model, version, reason) (rate(shoal_infer_shed_total[{RATE}])) | {_OF_MODEL} {{{{reason}}}}",
                f"sum by (model, version) (rate(shoal_infer_expired_total[{RATE}])) | {_OF_MODEL} expired",
            ),
            panel(
                "Budget of the objectives",
                "short",
                "Speed at which it is spent, over an hour: at 1, the budget of 30 days lasts for 30 days.",
                *(
                    f"{missed} / on (model, version) (1 - max by (model, version) (shoal_infer_slo_{of}_ratio))"
                    f" | {_OF_MODEL} {of}"
                    for of, missed in (
                        ("availability", _share_of_hour('requests_total{outcome="failure"}', "requests_total")),
                        (
                            "latency",
                            "(1 - "
                            + _share_of_hour("requests_within_slo_total", 'requests_total{outcome="success"}')
                            + ")",
                        ),
                    )
                ),
            ),
            panel(
                "Instances that serve it",
                "short",
                "By version.",
                f"sum by (model, version) (shoal_infer_model_ready) | {_OF_MODEL}",
            ),
        ),
    ),
    "tenant": (
        "Shoal: tenants",
        (
            panel(
                "Requests",
                "reqps",
                "Of the 50 tenants with the most, in each process; the others are one.",
                f"sum by (tenant) (rate(shoal_infer_tenant_requests_total[{RATE}])) | {{{{tenant}}}}",
            ),
            panel(
                "Rows",
                "ops",
                "Rows a second of these requests.",
                f"sum by (tenant) (rate(shoal_infer_tenant_rows_total[{RATE}])) | {{{{tenant}}}}",
            ),
            panel(
                "Memory of open requests",
                "bytes",
                "Bytes that requests of a tenant hold until they are answered. Without a name: calls between services.",
                "topk(20, sum by (tenant) (shoal_connection_memory_tenant_bytes)) | {{tenant}}",
            ),
            panel(
                "Age of the oldest due job",
                "s",
                "Of the 20 tenants whose jobs wait longest. Without a name: of all.",
                "max by (tenant) (shoal_ingest_queue_age_seconds) or max(shoal_ingest_queue_oldest_seconds)"
                " | {{tenant}}",
            ),
            panel(
                "Queued jobs",
                "short",
                "Of these tenants, 10,000 at most of each. Without a name: of all.",
                "max by (tenant) (shoal_ingest_queue_jobs) or max(shoal_ingest_backlog) | {{tenant}}",
            ),
            panel(
                "Bytes in the store",
                "bytes",
                "Results and payloads of the 20 tenants with the most.",
                "max by (tenant) (shoal_store_tenant_size_bytes) | {{tenant}}",
            ),
            panel(
                "Calls that a limit refused",
                "reqps",
                "By limit of the policy and its number. Without a name: there are none.",
                f"sum by (limit, of) (rate(shoal_limits_refused_total[{RATE}])) or vector(0)"
                " | {{limit}} {{of}}",
            ),
        ),
    ),
    "jobs": (
        "Shoal: jobs",
        (
            panel(
                "Jobs accepted",
                "ops",
                "A second, by instance of ingest.",
                f"sum by (instance) (rate(shoal_ingest_jobs_accepted_total[{RATE}])) | {{{{instance}}}}",
            ),
            JOBS_ENDED,
            OLDEST,
            panel("Backlog", "short", "Queued jobs, estimated.", "max(shoal_ingest_backlog) | queued"),
            panel(
                "Jobs held",
                "short",
                "Running, or about to.",
                "sum by (instance) (shoal_ingest_jobs_held) | {{instance}}",
            ),
            panel(
                "Attempts again",
                "ops",
                "Jobs that went back to the queue, and leases that were lost.",
                f"sum(rate(shoal_ingest_jobs_put_back_total[{RATE}])) | put back",
                f"sum(rate(shoal_ingest_leases_lost_total[{RATE}])) | leases lost",
            ),
            panel(
                "Results recorded",
                "ops",
                "A second, by instance of the store.",
                f"sum by (instance) (rate(shoal_store_results_recorded_total[{RATE}])) | {{{{instance}}}}",
            ),
            panel(
                "Bytes in the store",
                "bytes",
                "Results, and payloads of jobs.",
                "max by (kind) (shoal_store_kept_size_bytes) | {{kind}}",
            ),
            panel(
                "Rows of batches",
                "ops",
                "A second, by outcome.",
                f"sum by (outcome) (rate(shoal_ingest_batch_rows_total[{RATE}])) | {{{{outcome}}}}",
            ),
            panel(
                "Round trip to MongoDB",
                "s",
                "Of a small read.",
                "shoal_ingest_mongo_round_trip_seconds | {{instance}}",
                "shoal_store_mongo_round_trip_seconds | {{instance}}",
            ),
            panel(
                "Schedules",
                "ops",
                "Jobs of schedules: submitted, skipped, failed.",
                *(
                    f"sum(rate(shoal_ingest_schedules_{what}_total[{RATE}])) | {what}"
                    for what in ("fired", "skipped", "failed")
                ),
            ),
        ),
    ),
    "mesh": (
        "Shoal: mesh",
        (
            panel(
                "Instances",
                "short",
                "Known instances, by service and state.",
                "max by (of, state) (shoal_coord_instances) | {{of}} {{state}}",
            ),
            panel("Leader", "short", "1: the instance leads.", "shoal_coord_leader | {{instance}}"),
            panel(
                "Configuration that an Envoy refused",
                "short",
                "1: it has refused the last one of the type.",
                "max by (node, type) (shoal_coord_xds_refused) | {{node}} {{type}}",
            ),
            panel(
                "Requests to services",
                "reqps",
                "Of Envoy, by cluster.",
                f"sum by (envoy_cluster_name) (rate(envoy_cluster_upstream_rq_total[{RATE}])) | {_CLUSTER}",
            ),
            panel(
                "Errors of services, and of Envoy for them",
                "reqps",
                "Class 5: no instance answered, time over, or an error over REST.",
                "sum by (envoy_cluster_name, envoy_response_code_class) (rate(envoy_cluster_upstream_rq_xx"
                f'{{envoy_response_code_class=~"4|5"}}[{RATE}])) | {_CLUSTER_CLASS}',
            ),
            panel(
                "Retries",
                "reqps",
                "By cluster.",
                f"sum by (envoy_cluster_name) (rate(envoy_cluster_upstream_rq_retry[{RATE}])) | {_CLUSTER}",
            ),
            panel(
                "Healthy endpoints",
                "short",
                "By cluster.",
                "sum by (envoy_cluster_name) (envoy_cluster_membership_healthy) | {{envoy_cluster_name}}",
            ),
            panel(
                "Ejected endpoints",
                "short",
                "By cluster.",
                f"sum by (envoy_cluster_name) (envoy_cluster_outlier_detection_ejections_active) | {_CLUSTER}",
            ),
            panel("Round trip to etcd", "s", "Of the last call.", "shoal_coord_etcd_round_trip_seconds | {{instance}}"),
        ),
    ),
    "node": (
        "Shoal: nodes",
        (
            MEMORY,
            PROCESSOR,
            panel(
                "Event loop stalls",
                "percentunit",
                "Share of the time in which all calls of a process wait.",
                f"rate(shoal_event_loop_stalled_seconds_total[{RATE}]) | {{{{instance}}}}",
            ),
            panel(
                "Memory of connections",
                "percentunit",
                "Share of the limit that requests and unread responses hold.",
                "shoal_connection_memory_bytes / shoal_connection_memory_limit_bytes | {{instance}} {{kind}}",
            ),
            panel(
                "Requests rejected without memory",
                "reqps",
                "By process.",
                f"rate(shoal_connection_memory_refused_total[{RATE}]) | {{{{instance}}}}",
            ),
            panel(
                "Open files",
                "percentunit",
                "Share of the limit.",
                "process_open_file_descriptors / process_file_descriptor_limit | {{instance}}",
            ),
            panel("Restarts", "short", "Since the node's start.", "shoal_process_restarts_total | {{instance}}"),
            panel(
                "Memory of Envoy",
                "bytes",
                "In use, and taken from the system.",
                "envoy_server_memory_allocated | allocated",
                "envoy_server_memory_heap_size | heap",
            ),
        ),
    ),
}


def document(name: str) -> dict[str, Any]:
    """Return a dashboard in Grafana's model."""
    title, panels = DASHBOARDS[name]
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": f"shoal-{name}",
        "title": title,
        "tags": ["shoal"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(number, each, source) for number, each in enumerate(panels)],
    }


def _panel(number: int, each: Panel, source: dict[str, str]) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": each.title,
        "description": each.help,
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": each.unit, "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": source, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(each.queries)
        ],
    }


if __name__ == "__main__":
    texts = {FOLDER / f"{name}.json": json.dumps(document(name), indent=2) + "\n" for name in DASHBOARDS}
    if "--check" not in sys.argv:
        FOLDER.mkdir(exist_ok=True)
        for path, text in texts.items():
            path.write_text(text)
    elif stale := [str(path) for path, text in texts.items() if not path.exists() or path.read_text() != text]:
        sys.exit(f"stale: {', '.join(stale)}: run tools/dashboards.py")
