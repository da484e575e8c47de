"""Parts of an execution in the statistics: batches that are held, copies, and responses that are written together."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from typing import Any

from opentelemetry.trace import SpanContext, TraceFlags

from mesh.metrics.histogram import PART_SECONDS, Buckets
from services.infer import metrics
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.scheduling import delivery
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.delivery import OutcomeQueue, PendingRequest
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.statistics import Statistics
from tests.infer.scheduling.virtual_time import Bench, call, run

TRACE = SpanContext(17, 7, False, TraceFlags(TraceFlags.SAMPLED))


def bucket(seconds: float) -> int:
    return bisect_left(PART_SECONDS, seconds)


class Writer:
    """A receiver that writes its response, on a clock of the test: one millisecond each."""

    is_direct = True

    def __init__(self, now_ns: list[int], *, writes: bool = True) -> None:
        self._now_ns = now_ns
        self.writes = writes

    def succeeded(self, result: Any) -> None:
        self._now_ns[0] += 1_000_000

    def failed(self, error: Any) -> None:
        self._now_ns[0] += 1_000_000


def test_a_batch_is_held_from_its_first_request_or_until_an_instance_was_free() -> None:
    async def main() -> Statistics:
        bench = Bench(lambda rows: 0.5, BatchPolicy(8, 1 << 20, delay_s=0.02), QueueLimits())
        async with bench.scheduler:
            # Held for its delay, on a free instance.
            first = asyncio.ensure_future(bench.scheduler.submit(call(1)))
            await asyncio.sleep(0.1)
            # This one waits for the instance, longer than the delay: the batch itself is not held.
            second = asyncio.ensure_future(bench.scheduler.submit(call(2)))
            await asyncio.gather(first, second)
            assert first.result().queue_ns == 20_000_000
            assert second.result().queue_ns == 420_000_000
        return bench.statistics

    forming = run(main()).forming
    assert math.isclose(forming.sum, 0.02)
    assert sum(forming.counts) == 2
    assert forming.counts[0] == forming.counts[bucket(0.02)] == 1


def test_copies_are_counted_once_an_execution_and_their_sum_is_that_of_all() -> None:
    found = Statistics()
    times = ExecutionTimes(rows=4, gather_ns=20_000, compute_ns=1_000_000, scatter_ns=2_000_000)
    found.executed(times, now_ms=1)
    found.executed(times, now_ms=2)
    found.succeeded_together(times, 8, queue_ns=0, total_ns=8)
    readings = {family: value for family, _, value in metrics._parts(found, metrics._NO_EXEMPLARS, ("m", "1"))}
    assert readings.keys() == {metrics.GATHER, metrics.SCATTER}
    for family, seconds in ((metrics.GATHER, 20e-6), (metrics.SCATTER, 2e-3)):
        read = readings[family]
        assert isinstance(read, Buckets)
        assert (sum(read.counts), read.counts[bucket(seconds)]) == (2, 2)
        assert math.isclose(read.sum, 2 * seconds)


def test_a_model_that_has_run_nothing_has_no_series_of_parts() -> None:
    assert [*metrics._parts(Statistics(), metrics._NO_EXEMPLARS, ("m", "1"))] == []


async def test_the_responses_of_an_execution_are_timed_together(monkeypatch: Any) -> None:
    now_ns, written = [1_000], []
    monkeypatch.setattr(delivery, "perf_counter_ns", lambda: now_ns[0])

    def concluded(*, writes: bool = True, outcome: Any = None) -> PendingRequest:
        request = PendingRequest(Writer(now_ns, writes=writes))
        request.conclude(outcome or InferenceResult((), ExecutionTimes()))
        return request

    outcomes = OutcomeQueue()
    outcomes.extend([concluded() for _ in range(3)], written.append)
    # Of others that end in the same pass; the slow path writes later, and errors are no responses.
    outcomes.extend([concluded(writes=False)], written.append)
    outcomes.extend([concluded(outcome=ValueError())], written.append)
    outcomes.extend([], written.append)
    outcomes.extend([concluded() for _ in range(2)], written.append)
    await asyncio.sleep(0)
    assert written == [3_000_000, 2_000_000]
    outcomes.add_direct(concluded(), written.append)
    assert written == [3_000_000, 2_000_000, 1_000_000]
    # Another outcome waits: the lone one is delivered behind it, and timed there.
    outcomes.extend([concluded(writes=False)], written.append)
    outcomes.add_direct(concluded(), written.append)
    assert len(written) == 3
    await asyncio.sleep(0)
    assert written[3:] == [1_000_000]


def test_a_part_of_a_sampled_request_is_an_exemplar() -> None:
    found = Statistics()
    found.formed(0.02, None)
    found.writing(None)(5_000)
    assert found.exemplars is None
    found.formed(0.02, TRACE)
    found.writing(TRACE)(5_000)
    assert found.exemplars is not None
    for exemplars, seconds in ((found.exemplars.forming, 0.02), (found.exemplars.serialise, 5e-6)):
        [kept] = [(at, each) for at, each in enumerate(exemplars.read()) if each]
        assert (kept[0], kept[1].trace_id, kept[1].value) == (bucket(seconds), 17, seconds)
