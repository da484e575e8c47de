"""The scheduler with a model under the test's control: what is executed, when, and what never is."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from services.infer.requests.parameters import Parameters
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.execution import Execution
from services.infer.scheduling.queue import QueuedRequest, QueueLimits
from services.infer.scheduling.rules import Level, Rules
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from shoal.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from shoal.oip.datatypes import BY_NAME
from tests.breakable import until

X, Y = TensorSpec("x", BY_NAME["FP32"], (-1, 1)), TensorSpec("y", BY_NAME["FP32"], (-1, 1))


class Clock:
    """Stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Model(Session):
    """y = 2x; 13 is a number that it cannot stand. Runs when the gate is open, and remembers what it ran."""

    inputs, outputs, text = (X,), (Y,), False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.runs: list[list[float]] = []
        self.entered = 0
        self.compute = lambda x: 2 * x

    def run(self, inputs, outputs: Sequence[str]):
        self.entered += 1
        assert self.gate.wait(30)
        x = inputs["x"]
        self.runs.append(x[:, 0].tolist())
        if 13 in x:
            raise ModelFailed("thirteen")
        return [self.compute(x)]

    def close(self) -> None: ...

    @property
    def executed(self) -> list[float]:
        return [value for run in self.runs for value in run]


def call(*values: float, key: object = "k", timeout_us: int = 0) -> InferenceRequest:
    x = np.array(values, np.float32)[:, None]
    return InferenceRequest({"x": x}, (WantedOutput(Y),), len(values), x.nbytes, key, Parameters(timeout_us))


class Nobody:
    """Receives, and does not care."""

    is_direct = True
    writes = False

    def succeeded(self, result) -> None: ...

    def failed(self, error) -> None: ...


class Bench:
    """A scheduler over a Model, and the calls that the test has made."""

    def __init__(self, **options) -> None:
        self.model, self.clock, self.statistics = Model(), Clock(), Statistics()
        policy = options.pop("policy", BatchPolicy(8, 1 << 20))
        limits = options.pop("limits", QueueLimits())
        self.scheduler = Scheduler(
            "m", self.execution, policy, limits, statistics=self.statistics, clock=self.clock, **options
        )

    def execution(self) -> Execution:
        return Execution("m", self.model, Signature((X,), (Y,), 8), self.clock)

    async def occupied(self) -> asyncio.Task:
        """The model is busy with a call until its gate is opened."""
        self.model.gate.clear()
        entered = self.model.entered
        task = self.submit(call(-1))
        await until(lambda: self.model.entered > entered)
        return task

    def submit(self, made: InferenceRequest, deadline: float = math.inf) -> asyncio.Task:
        return asyncio.ensure_future(self.scheduler.submit(made, deadline))

    async def queued(self, *made: InferenceRequest, deadline: float = math.inf) -> list[asyncio.Task]:
        tasks = [self.submit(each, deadline) for each in made]
        await asyncio.sleep(0)
        return tasks


def values(result) -> list[float]:
    return result.outputs[0][:, 0].tolist()


async def test_queued_requests_run_together_and_their_outputs_are_split():
    bench = Bench()
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(call(1), call(2, 3), call(4))
        bench.model.gate.set()
        assert values(await first) == [-2]
        assert [values(await task) for task in tasks] == [[2], [4, 6], [8]]
    assert bench.model.runs == [[-1], [1, 2, 3, 4]]
    assert (bench.statistics.rows, bench.statistics.executions, bench.statistics.success.count) == (5, 2, 4)
    assert sorted(bench.statistics.by_rows) == [1, 4]


async def test_results_do_not_change_when_the_next_batch_runs():
    bench = Bench()
    async with bench.scheduler:
        results = []
        for base in (0, 100):
            first = await bench.occupied()
            tasks = await bench.queued(call(base + 1), call(base + 2))
            bench.model.gate.set()
            await first
            results += [await task for task in tasks]
        assert [values(result) for result in results] == [[2], [4], [202], [204]]


async def test_requests_of_different_shapes_are_not_stacked():
    bench = Bench()
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(call(1, key="a"), call(2, key="b"), call(3, key="a"))
        bench.model.gate.set()
        await asyncio.gather(first, *tasks)
    assert bench.model.runs == [[-1], [1, 3], [2]]


async def test_a_failing_request_fails_alone():
    bench = Bench()
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(call(1), call(13), call(3))
        bench.model.gate.set()
        await first
        assert values(await tasks[0]) == [2]
        with pytest.raises(Internal, match=r"Failed to process the request\(s\) for model 'm': thirteen"):
            await tasks[1]
        assert values(await tasks[2]) == [6]
        assert values(await bench.scheduler.submit(call(5))) == [10]


async def test_outputs_without_a_batch_dimension_are_reported():
    bench = Bench()
    bench.model.compute = lambda x: np.zeros((1, 1), np.float32)
    async with bench.scheduler:
        with pytest.raises(Internal, match=r"output 'y' has shape \[1,1\] for 2 rows.*max_batch_size"):
            await bench.scheduler.submit(call(1, 2))


async def test_an_internal_error_fails_the_batch_and_the_worker_goes_on():
    bench = Bench()
    bench.model.compute = lambda x: 1 / 0
    async with bench.scheduler:
        with pytest.raises(ZeroDivisionError):
            await bench.scheduler.submit(call(1))
        bench.model.compute = lambda x: x
        assert values(await bench.scheduler.submit(call(1))) == [1]


async def test_a_cancelled_request_is_never_executed():
    bench = Bench()
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(call(1), call(2))
        tasks[0].cancel()
        await asyncio.sleep(0)
        bench.model.gate.set()
        await asyncio.gather(first, tasks[1])
    assert bench.model.executed == [-1, 2]


def test_a_request_that_is_cancelled_after_take_is_not_executed():
    bench = Bench()
    gone, here = (QueuedRequest(call(n), 0.0, math.inf, Nobody()) for n in (1, 2))
    gone.is_abandoned = True
    outcomes = bench.execution().run([gone, here])
    assert isinstance(outcomes[0], DeadlineExceeded)
    assert outcomes[1].outputs[0].tolist() == [[4]]
    assert isinstance(bench.execution().run([gone])[0], DeadlineExceeded)
    assert bench.model.executed == [2]


async def test_an_expired_request_is_rejected_on_arrival():
    bench = Bench()
    async with bench.scheduler:
        with pytest.raises(DeadlineExceeded, match="Request timeout expired"):
            await bench.scheduler.submit(call(1), deadline=bench.clock.now)
    assert bench.model.executed == []


@pytest.mark.parametrize("how", ["deadline", "timeout", "default"])
async def test_a_request_that_expires_in_the_queue_is_never_executed(how):
    bench = Bench(rules=Rules((Level(timeout_s=0.01 if how == "default" else math.inf),)))
    async with bench.scheduler:
        bench.model.gate.clear()
        first = bench.submit(call(-1))
        await until(lambda: bench.model.entered > 0)
        deadline = bench.clock.now + 0.01 if how == "deadline" else math.inf
        (task,) = await bench.queued(call(1, timeout_us=10_000 if how == "timeout" else 0), deadline=deadline)
        bench.clock.now += 0.02
        # It hears of it although the model is still busy.
        with pytest.raises(DeadlineExceeded, match="it was not executed"):
            await asyncio.wait_for(task, 30)
        bench.model.gate.set()
        await first
    assert bench.model.executed == [-1]


async def test_a_request_that_expires_before_its_run_is_left_out_of_the_batch():
    bench = Bench()
    async with bench.scheduler:
        first = await bench.occupied()
        late, soon = await bench.queued(call(1)), await bench.queued(call(2), deadline=bench.clock.now + 60)
        bench.clock.now += 61  # Its timer has not fired; the clock says that it is over.
        bench.model.gate.set()
        await first
        assert values(await late[0]) == [2]
        with pytest.raises(DeadlineExceeded):
            await soon[0]
    assert bench.model.executed == [-1, 1]
    assert bench.statistics.expired == 1


async def test_a_timeout_bounds_the_queue_and_not_the_execution():
    bench = Bench()
    async with bench.scheduler:
        bench.model.gate.clear()
        task = bench.submit(call(1, timeout_us=1000))
        await until(lambda: bench.model.entered > 0)
        bench.clock.now += 10
        bench.model.gate.set()
        assert values(await task) == [2]


@pytest.mark.parametrize("limits", [QueueLimits(calls=2), QueueLimits(size_bytes=8)])
async def test_a_full_queue_rejects_with_a_retry_time(limits):
    bench = Bench(limits=limits)
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(call(1), call(2))
        with pytest.raises(ResourceExhausted, match="Exceeds maximum queue size of model 'm': 2 requests") as err:
            await bench.scheduler.submit(call(3))
        assert err.value.retry_after_ms > 0
        tasks[0].cancel()  # A place is free again.
        await asyncio.sleep(0)
        (fourth,) = await bench.queued(call(4))
        bench.model.gate.set()
        await asyncio.gather(first, tasks[1], fourth)
    assert bench.model.executed == [-1, 2, 4]


async def test_an_empty_queue_accepts_a_request_of_any_size():
    bench = Bench(limits=QueueLimits(size_bytes=1))
    async with bench.scheduler:
        assert values(await bench.scheduler.submit(call(1, 2, 3))) == [2, 4, 6]


async def test_instances_run_concurrently():
    bench = Bench(instances=2, policy=BatchPolicy(1, 1 << 20))
    async with bench.scheduler:
        bench.model.gate.clear()
        tasks = await bench.queued(call(1), call(2), call(3))
        await until(lambda: bench.model.entered == 2)
        bench.model.gate.set()
        await asyncio.gather(*tasks)
    assert sorted(bench.model.executed) == [1, 2, 3]


async def test_with_a_delay_a_lone_request_waits_for_others_at_most_that_long():
    bench = Bench(policy=BatchPolicy(8, 1 << 20, delay_s=10.0))
    async with bench.scheduler:
        (task,) = await bench.queued(call(1))
        await asyncio.sleep(0)
        assert bench.model.entered == 0
        bench.clock.now += 10
        (other,) = await bench.queued(call(2))
        await asyncio.gather(task, other)
    assert bench.model.runs == [[1, 2]]


@pytest.mark.parametrize("fault", [StopIteration("over"), SystemExit(1), KeyboardInterrupt()])
async def test_any_exception_of_the_model_reaches_its_caller_and_the_worker_goes_on(fault):
    def throw(x):
        raise fault

    bench = Bench()
    bench.model.compute = throw
    async with bench.scheduler:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(bench.scheduler.submit(call(1)), 30)
        bench.model.compute = lambda x: x
        assert values(await bench.scheduler.submit(call(1))) == [1]


def test_a_request_that_expires_during_bisection_is_not_run():
    bench = Bench()
    execution = bench.execution()
    jobs = [QueuedRequest(call(n), 0.0, math.inf, Nobody()) for n in (13, 2, 3, 4)]
    jobs[2].expires = bench.clock.now + 1

    def slow(inputs, outputs, run=bench.model.run):
        bench.clock.now += 0.6
        if bench.model.entered == 2:
            jobs[3].is_abandoned = True
        return run(inputs, outputs)

    bench.model.run = slow
    outcomes = execution.run(jobs)
    assert bench.model.runs == [[13, 2, 3, 4], [13, 2], [13], [2]]
    assert [type(outcome).__name__ for outcome in outcomes] == [
        *("Internal", "InferenceResult", "DeadlineExceeded", "DeadlineExceeded")
    ]
    assert execution.tally.expired_rows == 0
    assert execution.tally.bisections == 2


async def test_a_request_that_expires_during_bisection_is_counted_as_expired():
    bench = Bench()

    def slow(inputs, outputs, run=bench.model.run):
        bench.clock.now += 0.6
        return run(inputs, outputs)

    async with bench.scheduler:
        first = await bench.occupied()
        (poison,) = await bench.queued(call(13))
        late = await bench.queued(call(2), call(3), deadline=bench.clock.now + 1)
        bench.model.run = slow
        bench.model.gate.set()
        await first
        with pytest.raises(Internal):
            await poison
        for request in late:
            with pytest.raises(DeadlineExceeded):
                await request
    assert bench.statistics.expired == 2


def test_batch_mates_of_an_internal_error_succeed():
    bench = Bench()

    def compute(x):
        if 7 in x:
            raise MemoryError("too much")
        return x

    bench.model.compute = compute
    outcomes = bench.execution().run([QueuedRequest(call(n), 0.0, math.inf, Nobody()) for n in (1, 7, 3)])
    assert [type(outcome).__name__ for outcome in outcomes] == ["InferenceResult", "MemoryError", "InferenceResult"]


def test_a_goal_beside_static_settings_logs_a_warning(caplog):
    Bench(policy=BatchPolicy(8, 1 << 20, delay_s=0.1, slo_s=0.05))
    assert "slo_ms has no effect" in caplog.text


async def test_too_few_outcomes_fail_the_batch():
    bench = Bench()
    execution = bench.execution()
    execution._compute_outcomes = lambda *args: []
    outcomes = execution.run([QueuedRequest(call(n), 0.0, math.inf, Nobody()) for n in (1, 2)])
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 2


async def test_a_cancelled_shutdown_fails_the_queued_requests():
    bench = Bench()

    async def serve() -> None:
        async with bench.scheduler:
            ready.set()
            await asyncio.Event().wait()

    ready = asyncio.Event()
    server = asyncio.create_task(serve())
    await ready.wait()
    first = await bench.occupied()
    (waiting,) = await bench.queued(call(2))
    server.cancel()
    await asyncio.sleep(0)
    server.cancel()  # Once to leave, once more while it waits for the model.
    with pytest.raises(asyncio.CancelledError):
        await server
    with pytest.raises(Unavailable, match="being unloaded"):
        await waiting
    bench.model.gate.set()
    assert values(await first) == [-2]
    assert bench.model.executed == [-1]


async def test_a_receiver_that_raises_does_not_affect_its_batch_mates(caplog):
    class Clumsy(Nobody):
        def succeeded(self, result) -> None:
            raise ValueError("clumsy")

    bench = Bench()
    async with bench.scheduler:
        first = await bench.occupied()
        bench.scheduler.start(call(1), math.inf, "", Clumsy())
        (mate,) = await bench.queued(call(2))
        bench.model.gate.set()
        assert values(await mate) == [4]
        await first
    assert "clumsy" in caplog.text


@pytest.mark.usefixtures("no_collections")
async def test_requests_that_arrive_one_by_one_run_without_a_loop_iteration():
    bench = Bench()
    bench.model.only_computes = True

    class Told(Nobody):
        result = None

        def succeeded(self, result) -> None:
            self.result = result

    async with bench.scheduler:
        for _ in range(20):
            bench.clock.now += 1.0
            await bench.scheduler.submit(call(1))
        bench.clock.now += 1.0
        told, mates = Told(), [Told(), Told()]
        bench.scheduler.start(call(2), math.inf, "", told)
        assert values(told.result) == [4]
        # Whoever comes right behind it may have company.
        for mate in mates:
            bench.scheduler.start(call(3), math.inf, "", mate)
        assert [mate.result for mate in mates] == [None, None]
        await until(lambda: all(mate.result is not None for mate in mates))
    assert bench.model.runs[-2:] == [[2], [3, 3]]


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(("compute_ms", "alone_on_loop"), [(0.05, True), (0.3, True), (5.0, False)])
async def test_a_longer_batch_runs_on_the_loop_only_for_a_lone_request(compute_ms, alone_on_loop):
    bench = Bench()
    bench.model.only_computes = True
    threads = []

    def compute(x):
        threads.append(threading.current_thread() is threading.main_thread())
        end = time.thread_time() + compute_ms / 1e3
        while time.thread_time() < end:
            pass
        return 2 * x

    bench.model.compute = compute
    async with bench.scheduler:
        for _ in range(30):
            bench.clock.now += 1.0
            await bench.scheduler.submit(call(1))
        alone = threads[-5:]
        threads.clear()
        for _ in range(5):
            await asyncio.gather(*await bench.queued(call(1), call(2)))
    assert alone == [alone_on_loop] * 5
    if compute_ms > 0.1:
        assert threads == [False] * len(threads)


async def test_requests_that_arrive_in_bursts_run_together():
    bench = Bench()
    async with bench.scheduler:
        for _ in range(20):
            bench.clock.now += 1.0
            await asyncio.gather(*await bench.queued(call(1), call(2), call(3)))
    assert bench.model.runs == [[1, 2, 3]] * 20


async def test_closing_runs_the_queue_and_accepts_no_more():
    bench = Bench(policy=BatchPolicy(8, 1 << 20, delay_s=1000.0))
    async with bench.scheduler:
        (task,) = await bench.queued(call(1))
    assert values(await task) == [2]
    with pytest.raises(Unavailable, match="being unloaded"):
        await bench.scheduler.submit(call(2))


def wide(length: int) -> InferenceRequest:
    """A request of one row with a length of its own, as of a model with a free dimension."""
    x = np.ones((1, length), np.float32)
    return InferenceRequest({"x": x}, (WantedOutput(Y),), 1, x.nbytes, ("k", length), Parameters())


def burn(ms: float) -> None:
    """Use the processor for so long."""
    end = time.thread_time() + ms / 1e3
    while time.thread_time() < end:
        pass


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Keep the garbage of the whole test run out of the measured times."""
    gc.disable()
    yield
    gc.enable()


class OnLoop(Bench):
    """A scheduler whose model may run on the event loop; `threads` has True for each run that did."""

    def __init__(self, cost_ms) -> None:
        super().__init__()
        self.model.only_computes = True
        self.threads: list[bool] = []

        def compute(x):
            self.threads.append(threading.current_thread() is threading.main_thread())
            cost_ms(x)
            return 2 * x[:, :1]

        self.model.compute = compute

    async def one(self, made: InferenceRequest) -> bool:
        """Run a lone request; return True when it ran on the loop."""
        self.clock.now += 1e-3
        await self.scheduler.submit(made)
        return self.threads[-1]


@pytest.mark.usefixtures("no_collections")
async def test_a_larger_input_than_those_that_were_learned_from_does_not_run_on_the_loop():
    """As a model with attention: short inputs are quick, and a long one takes as long as thousands of them."""
    bench = OnLoop(lambda x: burn(5 if x.shape[1] > 100 else 0.01))
    async with bench.scheduler:
        for _ in range(60):
            await bench.one(wide(8))
        assert await bench.one(wide(8))
        for _ in range(8):
            assert not await bench.one(wide(3_000))
            assert await bench.one(wide(8))


@pytest.mark.usefixtures("no_collections")
async def test_inputs_of_another_size_run_on_the_loop_once_their_cost_is_known():
    bench = OnLoop(lambda x: burn(0.01))
    async with bench.scheduler:
        for _ in range(60):
            await bench.one(wide(8))
        for length in (40, 200, 1_000):
            ran = [await bench.one(wide(length)) for _ in range(3)]
            assert ran == [False, True, True]


@pytest.mark.usefixtures("no_collections")
async def test_a_run_that_holds_the_loop_too_long_bars_its_model_from_the_loop_for_a_while():
    bench = OnLoop(lambda x: burn(10 if 99 in x else 0.01))
    async with bench.scheduler:
        for _ in range(60):
            await bench.one(call(1))
        assert await bench.one(call(99))
        assert not await bench.one(call(99))
        assert not await bench.one(call(1))
        bench.clock.now += 1_000 * 0.010 - 1
        assert not await bench.one(call(1))
        bench.clock.now += 3_600
        assert await bench.one(call(1))


@pytest.mark.usefixtures("no_collections")
async def test_a_run_that_waited_for_a_processor_bars_nothing():
    bench = OnLoop(lambda x: time.sleep(0.02) if 99 in x else burn(0.01))
    async with bench.scheduler:
        for _ in range(60):
            await bench.one(call(1))
        assert await bench.one(call(99))
        assert await bench.one(call(1))
