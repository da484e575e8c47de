"""Metrics of infer, read from the statistics of its models at a scrape. Nothing is counted twice.

Beside Shoal's own are Triton's (`nv_inference_*`), for dashboards, autoscalers and perf_analyzer:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from mesh.metrics.families import Family, Kind, Reading, Source
from mesh.metrics.histogram import PART_SECONDS, SECONDS, Buckets
from services.infer.models.models import Models
from services.infer.models.version import State, Version
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import RequestExemplars, Shed, Statistics

_MODEL = ("model", "version")
C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

REQUESTS = Family("shoal.infer.requests", C, "{request}", "Requests that have ended.", (*_MODEL, "outcome"))
SLO = Family(
    "shoal.infer.slo",
    G,
    "s",
    "Latency goal of a model that has one: an objective of the policy, or its parameter `slo_ms`.",
    _MODEL,
)
SLO_LATENCY = Family(
    "shoal.infer.slo.latency", G, "1", "Share of successful requests that must meet the latency goal.", _MODEL
)
SLO_AVAILABILITY = Family("shoal.infer.slo.availability", G, "1", "Share of requests that must succeed.", _MODEL)
WITHIN_SLO = Family(
    "shoal.infer.requests.within_slo",
    C,
    "{request}",
    "Successful requests that met the latency goal; all, without one.",
    _MODEL,
)
DURATION = Family(
    "shoal.infer.request.duration", H, "s", "Time of successful requests, from arrival to outcome.", _MODEL
)
QUEUE = Family("shoal.infer.queue.duration", H, "s", "Time of successful requests in the queue.", _MODEL)
COMPUTE = Family("shoal.infer.compute.duration", H, "s", "Time of the model, by execution.", _MODEL)
BATCH = Family("shoal.infer.batch.size", H, "{row}", "Rows of an execution.", _MODEL)
FORMING = Family(
    "shoal.infer.forming.duration",
    H,
    "s",
    "Time for which a batch was held although an instance of the model was free: for more requests, a part of the "
    "time in the queue.",
    _MODEL,
)
GATHER = Family(
    "shoal.infer.gather.duration", H, "s", "Time to put the inputs of an execution together: copies.", _MODEL
)
SCATTER = Family("shoal.infer.scatter.duration", H, "s", "Time to split the outputs of an execution: copies.", _MODEL)
SERIALISE = Family(
    "shoal.infer.serialise.duration",
    H,
    "s",
    "Time to write the responses of an execution, all of them together; on the slow path, of a response.",
    _MODEL,
)
EXPIRED = Family("shoal.infer.expired", C, "{request}", "Requests that expired before they were executed.", _MODEL)
CANCELLED = Family("shoal.infer.cancelled", C, "{request}", "Requests whose caller left first.", _MODEL)
SHED = Family(
    "shoal.infer.shed",
    C,
    "{request}",
    "Requests rejected or evicted: `queue_full`; `too_late` for the deadline or goal; `evicted` from a full queue by "
    "others; `memory`: none free for outputs.",
    (*_MODEL, "reason"),
)
EXPIRED_ROWS = Family("shoal.infer.expired_rows_executed", C, "{row}", "Rows run after their deadline: 0.", _MODEL)
BISECTIONS = Family("shoal.infer.bisections", C, "{batch}", "Failed batches split to find the poison.", _MODEL)
CACHE = Family(
    "shoal.infer.cache.lookups", C, "{lookup}", "Lookups in the response cache, `hit` or `miss`.", (*_MODEL, "result")
)
WAITING = Family("shoal.infer.queue.depth", G, "{request}", "Requests in the queue of a model with batches.", _MODEL)
AGE = Family("shoal.infer.queue.age", G, "s", "Age of the oldest request in that queue.", _MODEL)
READY = Family("shoal.infer.model.ready", G, "", "1: the version is ready; 0: it is not, for now.", _MODEL)
FIRST = Family(
    "shoal.infer.first_response.duration", H, "s", "Time to the first response of a decoupled model.", _MODEL
)
IN_FLIGHT = Family("shoal.infer.requests.in_flight", G, "{request}", "Requests that use the version now.", _MODEL)
CACHE_SIZE = Family("shoal.infer.cache.size", G, "By", "Bytes in the response cache, of all models.")
TENANT = Family(
    "shoal.infer.tenant.requests",
    C,
    "{request}",
    "Requests of the tenants with the most, begun; else `other`.",
    ("tenant",),
)
TENANT_ROWS = Family("shoal.infer.tenant.rows", C, "{row}", "Rows of these requests.", ("tenant",))
OWN = (
    *(
        REQUESTS,
        SLO,
        SLO_LATENCY,
        SLO_AVAILABILITY,
        WITHIN_SLO,
        DURATION,
        QUEUE,
        FORMING,
        GATHER,
        COMPUTE,
        SCATTER,
        SERIALISE,
        BATCH,
    ),
    *(EXPIRED, CANCELLED, SHED, EXPIRED_ROWS, BISECTIONS),
    *(CACHE, WAITING, AGE, READY, FIRST, IN_FLIGHT, CACHE_SIZE, TENANT, TENANT_ROWS),
)


def _nv(name: str, help: str, kind: Kind = C) -> Family:
    return Family(name, kind, "", f"As in Triton: {help}", _MODEL, verbatim=True)


NV_SUCCESS = _nv("nv_inference_request_success", "requests that succeeded.")
NV_FAILURE = _nv("nv_inference_request_failure", "requests that failed.")
NV_COUNT = _nv("nv_inference_count", "rows that were executed.")
NV_EXECUTIONS = _nv("nv_inference_exec_count", "executions of batches.")
NV_PENDING = _nv("nv_inference_pending_request_count", "requests in the queue.", G)
NV_DURATION = _nv("nv_inference_request_duration_us", "time of successful requests.")
NV_QUEUE = _nv("nv_inference_queue_duration_us", "time of successful requests in the queue.")
NV_INPUT = _nv("nv_inference_compute_input_duration_us", "time for inputs, summed over requests.")
NV_INFER = _nv("nv_inference_compute_infer_duration_us", "time of the model, summed over requests.")
NV_OUTPUT = _nv("nv_inference_compute_output_duration_us", "time for outputs, summed over requests.")
NV_HITS = _nv("nv_cache_num_hits_per_model", "hits of the response cache.")
NV_MISSES = _nv("nv_cache_num_misses_per_model", "misses of the response cache.")
NV_HIT_TIME = _nv("nv_cache_hit_duration_per_model", "time of hits, in us.")
NV_MISS_TIME = _nv("nv_cache_miss_duration_per_model", "time of misses, in us.")
TRITONS = (
    *(
        NV_SUCCESS,
        NV_FAILURE,
        NV_COUNT,
        NV_EXECUTIONS,
        NV_PENDING,
        NV_DURATION,
        NV_QUEUE,
        NV_INPUT,
        NV_INFER,
        NV_OUTPUT,
    ),
    *(NV_HITS, NV_MISSES, NV_HIT_TIME, NV_MISS_TIME),
)
FAMILIES = (*OWN, *TRITONS)

_NO_EXEMPLARS = RequestExemplars()


def source(models: Models) -> Source:
    """Return the readings of all versions that are loaded, or that should be."""

    def read() -> Iterable[Reading]:
        for version in models.known():
            if version.state is not State.UNKNOWN:
                yield from _of_version(version, (version.name, str(version.number)))
        yield CACHE_SIZE, (), models.responses.size_bytes
        tenants = models.tenants.largest
        tenants.settle()
        for tenant, (requests, rows) in tenants.rows():
            yield TENANT, (tenant,), requests
            yield TENANT_ROWS, (tenant,), rows

    return read


def _of_version(version: Version, labels: tuple[str, str]) -> Iterable[Reading]:
    found = version.statistics
    yield READY, labels, int(version.is_ready)
    yield IN_FLIGHT, labels, version.in_flight
    yield SLO_AVAILABILITY, labels, version.objective.availability
    if found.slo_s != math.inf:
        yield SLO, labels, found.slo_s
        yield SLO_LATENCY, labels, version.objective.latency
    yield from _counted(found, labels)
    exemplars = found.exemplars or _NO_EXEMPLARS
    total, queue = found.success.ns / 1e9, found.queue.ns / 1e9
    yield DURATION, labels, Buckets(SECONDS, list(found.durations), total, exemplars.total.read())
    yield QUEUE, labels, Buckets(SECONDS, list(found.queue_durations), queue, exemplars.queue.read())
    executed = sum(times.compute_ns for times in found.by_rows.values()) / 1e9
    yield COMPUTE, labels, Buckets(SECONDS, list(found.compute_durations), executed, exemplars.compute.read())
    yield BATCH, labels, found.sizes().read(exemplars.rows.read())
    yield from _parts(found, exemplars, labels)
    if version.decoupled is not None:
        yield FIRST, labels, found.first_responses.read(exemplars.first_response.read())
    if version.is_loaded and version.decoupled is None and isinstance(version.scheduler, Scheduler):
        depth, age_s = version.scheduler.waiting()
        yield WAITING, labels, depth
        yield AGE, labels, age_s
        yield NV_PENDING, labels, depth


def _parts(found: Statistics, exemplars: RequestExemplars, labels: tuple[str, str]) -> Iterable[Reading]:
    """Yield the parts of executions. A model that has run nothing has none of these series: there may be 500 models."""
    if found.executions:
        gathered = sum(times.gather_ns for times in found.by_rows.values()) / 1e9
        scattered = sum(times.scatter_ns for times in found.by_rows.values()) / 1e9
        yield GATHER, labels, Buckets(PART_SECONDS, list(found.gather_durations), gathered, exemplars.gather.read())
        yield SCATTER, labels, Buckets(PART_SECONDS, list(found.scatter_durations), scattered, exemplars.scatter.read())
    if any(found.forming.counts):
        yield FORMING, labels, found.forming.read(exemplars.forming.read())
    if any(found.serialise.counts):
        yield SERIALISE, labels, found.serialise.read(exemplars.serialise.read())


def _counted(found: Statistics, labels: tuple[str, str]) -> Iterable[Reading]:
    yield REQUESTS, (*labels, "success"), found.success.count
    yield REQUESTS, (*labels, "failure"), found.fail.count
    # Without a goal, too: a series that begins with a new objective would seem to have missed all requests before.
    yield WITHIN_SLO, labels, found.within_slo
    yield EXPIRED, labels, found.expired
    yield CANCELLED, labels, found.cancelled
    for reason, count in found.shed_by.items():
        # A model that sheds nothing has one series, and not four: there may be 500 models.
        if count or reason is Shed.QUEUE_FULL:
            yield SHED, (*labels, reason), count
    yield EXPIRED_ROWS, labels, found.expired_executed
    yield BISECTIONS, labels, found.bisections
    if found.cache_hit.count or found.cache_miss.count:
        yield CACHE, (*labels, "hit"), found.cache_hit.count
        yield CACHE, (*labels, "miss"), found.cache_miss.count
    yield NV_SUCCESS, labels, found.success.count
    yield NV_FAILURE, labels, found.fail.count
    yield NV_COUNT, labels, found.rows
    yield NV_EXECUTIONS, labels, found.executions
    yield NV_DURATION, labels, found.success.ns // 1_000
    yield NV_QUEUE, labels, found.queue.ns // 1_000
    yield NV_INPUT, labels, found.by_request.gather_ns // 1_000
    yield NV_INFER, labels, found.by_request.compute_ns // 1_000
    yield NV_OUTPUT, labels, found.by_request.scatter_ns // 1_000
    if found.cache_hit.count or found.cache_miss.count:
        yield NV_HITS, labels, found.cache_hit.count
        yield NV_MISSES, labels, found.cache_miss.count
        yield NV_HIT_TIME, labels, found.cache_hit.ns // 1_000
        yield NV_MISS_TIME, labels, found.cache_miss.ns // 1_000
