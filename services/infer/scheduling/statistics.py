"""Counts and times of one model version, as reported by ModelStatistics."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from opentelemetry.trace import SpanContext

from mesh.metrics.histogram import PART_SECONDS, ROWS, SECONDS, Exemplars, Histogram
from mesh.rpc.heavy_work import Steps
from services.infer.requests.outcome import ExecutionTimes
from services.infer.scheduling.execution import Tally
from shoal.inference.v2 import inference_pb2 as pb

_BUCKETS, _PART_BUCKETS = len(SECONDS) + 1, len(PART_SECONDS) + 1

# Sizes of batches in one step of a message: 0.3 ms.
_STEP_SIZES = 64


@dataclass(slots=True)
class Duration:
    """Count and total time of an event."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Add `count` events that took `ns` together."""
        self.count += count
        self.ns += ns

    def message(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=self.ns)


@dataclass(slots=True)
class BatchTimes:
    """Times of executions of one size."""

    count: int = 0
    gather_ns: int = 0
    compute_ns: int = 0
    scatter_ns: int = 0

    def add(self, times: ExecutionTimes, count: int = 1) -> None:
        self.count += count
        self.gather_ns += times.gather_ns * count
        self.compute_ns += times.compute_ns * count
        self.scatter_ns += times.scatter_ns * count

    def message(self, ns: int) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=ns)


class Shed(StrEnum):
    """Reason for which a request is rejected or evicted."""

    QUEUE_FULL = "queue_full"
    TOO_LATE = "too_late"
    """The request would not be done before its deadline or goal."""
    EVICTED = "evicted"
    """The queue was full, and its tenant or priority held more than its share."""
    MEMORY = "memory"
    """No memory is free for the outputs of the request."""


class RequestExemplars:
    """Exemplars of a version's histograms."""

    __slots__ = ("compute", "first_response", "forming", "gather", "queue", "rows", "scatter", "serialise", "total")

    def __init__(self) -> None:
        self.total, self.queue, self.compute, self.first_response = (Exemplars() for _ in range(4))
        self.forming, self.gather, self.scatter, self.serialise = (Exemplars(PART_SECONDS) for _ in range(4))
        self.rows = Exemplars(ROWS)


@dataclass
class Statistics:
    """Statistics of one model version since it was loaded. Only the event loop's thread uses them."""

    durations: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    """Successful requests by the time from arrival to outcome, in the buckets SECONDS."""
    queue_durations: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    """Successful requests by their time in the queue."""
    compute_durations: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    """Executions by the time of the model."""
    gather_durations: list[int] = field(default_factory=lambda: [0] * _PART_BUCKETS)
    """Executions by the time in which their inputs were put together, in the buckets PART_SECONDS."""
    scatter_durations: list[int] = field(default_factory=lambda: [0] * _PART_BUCKETS)
    """Executions by the time in which their outputs were split."""
    forming: Histogram = field(default_factory=lambda: Histogram(PART_SECONDS))
    """Batches by the time for which they were held although an instance of the model was free."""
    serialise: Histogram = field(default_factory=lambda: Histogram(PART_SECONDS))
    """Executions by the time in which their responses were written; on the slow path, responses."""
    first_responses: Histogram = field(default_factory=Histogram)
    """Requests of a decoupled model by the time from arrival to the first response."""
    slo_s: float = math.inf
    """The latency goal by which requests count: the policy's, or the model's own; infinite without one."""
    within_slo: int = 0
    """Successful requests that took `slo_s` at most."""
    exemplars: RequestExemplars | None = None
    """None until the first request of a sampled trace."""
    last_inference_ms: int = 0
    """Milliseconds since 1970."""
    rows: int = 0
    executions: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    """Requests that the response cache completed without an execution: time of the lookup."""
    cache_miss: Duration = field(default_factory=Duration)
    """Requests executed in spite of a response cache: time of the lookup and of storing the outputs."""
    by_request: BatchTimes = field(default_factory=BatchTimes)
    """By request: each counts the whole execution that it was part of."""
    by_rows: dict[int, BatchTimes] = field(default_factory=dict)
    """By execution."""
    expired: int = 0
    """Requests that expired before they were executed."""
    cancelled: int = 0
    """Requests whose caller left before they were completed."""
    shed_by: dict[Shed, int] = field(default_factory=lambda: dict.fromkeys(Shed, 0))
    """Requests that were rejected or evicted, by reason."""
    expired_executed: int = 0
    """Rows executed after their deadline: always 0, unless there is a bug."""
    bisections: int = 0
    """Failed batches that were split in two to find the failing requests."""

    @property
    def shed(self) -> int:
        """Requests that were rejected or evicted, for any reason."""
        return sum(self.shed_by.values())

    def executed(self, times: ExecutionTimes, now_ms: int) -> None:
        """Count one successful execution."""
        self.last_inference_ms = now_ms
        self.executions += 1
        self.rows += times.rows
        self.compute_durations[bisect_left(SECONDS, times.compute_ns * 1e-9)] += 1
        self.gather_durations[bisect_left(PART_SECONDS, times.gather_ns * 1e-9)] += 1
        self.scatter_durations[bisect_left(PART_SECONDS, times.scatter_ns * 1e-9)] += 1
        of_size = self.by_rows.get(times.rows)
        if of_size is None:
            of_size = self.by_rows[times.rows] = BatchTimes()
        of_size.add(times)

    def succeeded(self, times: ExecutionTimes, *, queue_ns: int, total_ns: int) -> None:
        """Count one successful request."""
        self.durations[bisect_left(SECONDS, total_ns * 1e-9)] += 1
        self.within_slo += total_ns * 1e-9 <= self.slo_s
        self.queue_durations[bisect_left(SECONDS, queue_ns * 1e-9)] += 1
        self.succeeded_together(times, 1, queue_ns=queue_ns, total_ns=total_ns)

    def succeeded_together(self, times: ExecutionTimes, count: int, *, queue_ns: int, total_ns: int) -> None:
        """Count the successful requests of one execution; `queue_ns` and `total_ns` are their sums.

        The caller counts each in `durations`, `queue_durations` and `within_slo`.
        """
        self.success.add(total_ns, count)
        self.queue.add(queue_ns, count)
        self.by_request.add(times, count)

    def traced(self, trace: SpanContext, times: ExecutionTimes, *, queue_s: float, total_s: float) -> None:
        """Keep a successful request of a sampled trace as an exemplar; other calls count it."""
        found = self.exemplars = self.exemplars or RequestExemplars()
        ids = trace.trace_id, trace.span_id, time.time()
        found.total.add(total_s, *ids)
        found.queue.add(queue_s, *ids)
        found.compute.add(times.compute_ns * 1e-9, *ids)
        found.gather.add(times.gather_ns * 1e-9, *ids)
        found.scatter.add(times.scatter_ns * 1e-9, *ids)
        found.rows.add(times.rows, *ids)

    def formed(self, seconds: float, trace: SpanContext | None) -> None:
        """Count a batch that was held for `seconds`; `trace` is that of its first request, if sampled."""
        # Not `add`: a lone request of a tiny model pays for each call.
        self.forming.counts[bisect_left(PART_SECONDS, seconds)] += 1
        self.forming.sum += seconds
        if trace is not None:
            found = self.exemplars = self.exemplars or RequestExemplars()
            found.forming.add(seconds, trace.trace_id, trace.span_id, time.time())

    def wrote(self, ns: int, trace: SpanContext | None = None) -> None:
        """Count responses that were written together in `ns` nanoseconds; `trace` is a sampled one of theirs."""
        seconds = ns * 1e-9
        self.serialise.counts[bisect_left(PART_SECONDS, seconds)] += 1
        self.serialise.sum += seconds
        if trace is not None:
            found = self.exemplars = self.exemplars or RequestExemplars()
            found.serialise.add(seconds, trace.trace_id, trace.span_id, time.time())

    def writing(self, trace: SpanContext | None) -> Callable[[int], None]:
        """Return `wrote` for responses of this trace."""
        return self.wrote if trace is None else partial(self.wrote, trace=trace)

    def responded_first(self, trace: SpanContext | None, seconds: float) -> None:
        """Count the first response to a request of a decoupled model."""
        self.first_responses.add(seconds)
        if trace is not None:
            found = self.exemplars = self.exemplars or RequestExemplars()
            found.first_response.add(seconds, trace.trace_id, trace.span_id, time.time())

    def sizes(self) -> Histogram:
        """Return the executions by their number of rows."""
        sizes = Histogram(ROWS)
        for rows, times in list(self.by_rows.items()):
            sizes.add(rows, times.count)
        return sizes

    def tally(self, tally: Tally) -> None:
        """Add and clear the counts of an execution."""
        self.bisections += tally.bisections
        self.expired_executed += tally.expired_rows
        tally.bisections = tally.expired_rows = 0

    def hit(self, lookup_ns: int, total_ns: int) -> None:
        """Count one request that the response cache completed: from the store, or with another request's execution."""
        self.durations[bisect_left(SECONDS, total_ns * 1e-9)] += 1
        self.within_slo += total_ns * 1e-9 <= self.slo_s
        self.queue_durations[0] += 1
        self.success.add(total_ns)
        self.queue.add(0)
        self.cache_hit.add(lookup_ns)

    def missed(self, ns: int) -> None:
        """Count one request that missed the response cache; `succeeded` counts its execution."""
        self.cache_miss.add(ns)

    def failed(self, total_ns: int) -> None:
        """Count one request that was rejected, expired or failed."""
        self.fail.add(total_ns)

    def message(self, name: str, version: int) -> Steps[pb.ModelStatistics]:
        """Return the statistics as the protocol's message, in steps: there may be as many sizes as rows in a batch."""
        sizes = []
        for n, (rows, times) in enumerate(sorted(self.by_rows.items()), 1):
            sizes.append(
                pb.InferBatchStatistics(
                    batch_size=rows,
                    compute_input=times.message(times.gather_ns),
                    compute_infer=times.message(times.compute_ns),
                    compute_output=times.message(times.scatter_ns),
                )
            )
            if not n % _STEP_SIZES:
                yield
        return pb.ModelStatistics(
            name=name,
            version=str(version),
            last_inference=self.last_inference_ms,
            inference_count=self.rows,
            execution_count=self.executions,
            inference_stats=pb.InferStatistics(
                success=self.success.message(),
                fail=self.fail.message(),
                queue=self.queue.message(),
                compute_input=self.by_request.message(self.by_request.gather_ns),
                compute_infer=self.by_request.message(self.by_request.compute_ns),
                compute_output=self.by_request.message(self.by_request.scatter_ns),
                cache_hit=self.cache_hit.message(),
                cache_miss=self.cache_miss.message(),
            ),
            batch_stats=sizes,
            scheduling=pb.SchedulingStatistics(
                expired=self.expired,
                cancelled=self.cancelled,
                shed=self.shed,
                expired_executed=self.expired_executed,
                bisections=self.bisections,
            ),
        )
