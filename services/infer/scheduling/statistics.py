"""Counts and times of one model version, as ModelStatistics tells them."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.infer.requests.outcome import ExecutionTimes
from services.infer.scheduling.execution import Tally
from shoal.inference.v2 import inference_pb2 as pb


@dataclass(slots=True)
class Duration:
    """How often something took place, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """`count` of them, that took `ns` all together."""
        self.count += count
        self.ns += ns

    def message(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=self.ns)


@dataclass(slots=True)
class BatchTimes:
    """Executions of one size."""

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


@dataclass
class Statistics:
    """Of one model version, since it was loaded. Only the event loop's thread touches it."""

    last_inference_ms: int = 0
    """Milliseconds since 1970."""
    rows: int = 0
    executions: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    """Answered without an execution: looking it up."""
    cache_miss: Duration = field(default_factory=Duration)
    """Executed although there is a response cache: looking it up, and keeping the answer."""
    by_request: BatchTimes = field(default_factory=BatchTimes)
    """By request: each counts the whole of the execution that it was part of."""
    by_rows: dict[int, BatchTimes] = field(default_factory=dict)
    """By execution."""
    expired: int = 0
    """Requests whose time was over before they were run."""
    cancelled: int = 0
    """Requests that nobody waited for any more before they were answered."""
    shed: int = 0
    """Requests that were refused, or sent away, because too many wait to be done in time."""
    expired_executed: int = 0
    """Rows that were run although their time was over: 0, or there is a fault."""
    bisections: int = 0
    """Failed batches that were cut in two to find the guilty."""

    def executed(self, times: ExecutionTimes, now_ms: int) -> None:
        """One execution that came to an answer."""
        self.last_inference_ms = now_ms
        self.executions += 1
        self.rows += times.rows
        of_size = self.by_rows.get(times.rows)
        if of_size is None:
            of_size = self.by_rows[times.rows] = BatchTimes()
        of_size.add(times)

    def answered(self, times: ExecutionTimes, count: int = 1, *, queue_ns: int, total_ns: int) -> None:
        """Requests that one execution answered: how long they waited, and were here, all together."""
        self.success.add(total_ns, count)
        self.queue.add(queue_ns, count)
        self.by_request.add(times, count)

    def tally(self, tally: Tally) -> None:
        """Takes over, and clears, what an execution has counted."""
        self.bisections += tally.bisections
        self.expired_executed += tally.expired_rows
        tally.bisections = tally.expired_rows = 0

    def hit(self, lookup_ns: int, total_ns: int) -> None:
        """One request that was answered by the response cache: kept before, or computed for another request."""
        self.success.add(total_ns)
        self.queue.add(0)
        self.cache_hit.add(lookup_ns)

    def missed(self, ns: int) -> None:
        """One request that the response cache had no answer for, and that was `answered` by an execution."""
        self.cache_miss.add(ns)

    def failed(self, total_ns: int) -> None:
        """One request that was refused, expired or failed."""
        self.fail.add(total_ns)

    def message(self, name: str, version: int) -> pb.ModelStatistics:
        """As the protocol has it."""
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
            batch_stats=[
                pb.InferBatchStatistics(
                    batch_size=rows,
                    compute_input=times.message(times.gather_ns),
                    compute_infer=times.message(times.compute_ns),
                    compute_output=times.message(times.scatter_ns),
                )
                for rows, times in sorted(self.by_rows.items())
            ],
            scheduling=pb.SchedulingStatistics(
                expired=self.expired,
                cancelled=self.cancelled,
                shed=self.shed,
                expired_executed=self.expired_executed,
                bisections=self.bisections,
            ),
        )
