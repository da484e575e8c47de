"""The response cache under any order of events: never a wrong result, never too much kept, never run twice at once."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.infer.response_cache.cache import CacheState
from services.infer.response_cache.store import ResponseStore, size_bytes
from shoal.errors import DeadlineExceeded, Internal, ResourceExhausted, ShoalError
from tests.infer.response_cache.cached_model import Bench, Clock, Run, floats, settle
from tests.long_form import by_form

VALUES = range(3)
TTL_S = 10.0


class FakeTime(asyncio.SelectorEventLoop):
    """An event loop whose timers are on the test's clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._fake = clock

    def time(self) -> float:
        return self._fake.now


class Asked:
    """One call, and what the test knows of it."""

    def __init__(self, value: int, deadline: float, task: asyncio.Task) -> None:
        self.value, self.deadline, self.task = value, deadline, task
        self.is_cancelled = self.is_seen = False


class Flights(RuleBasedStateMachine):
    """Callers come, leave and run out of time; executions begin, end and fail; time passes."""

    @initialize(limit=st.sampled_from([0, 1_000, 20_000, 1 << 20]))
    def start(self, limit: int) -> None:
        self.bench = Bench(limit, TTL_S)
        self.limit = limit
        self.loop = FakeTime(self.bench.clock)
        self.calls: list[Asked] = []
        self.failed = dict.fromkeys(VALUES, 0)
        self.refused = dict.fromkeys(VALUES, 0)
        self.kept_at: dict[int, float] = {}
        self.succeeded = 0
        self.settle()

    def teardown(self) -> None:
        while self.bench.runs.open:
            self.finish(0)
        assert all(call.task.done() for call in self.calls)
        self.loop.run_until_complete(self.bench.cache.__aexit__(None, None, None))
        assert (len(self.bench.store), self.bench.store.size_bytes) == (0, 0)
        self.loop.close()

    def settle(self) -> None:
        self.loop.run_until_complete(settle())
        for call in self.calls:
            if call.task.done() and not call.is_seen:
                call.is_seen = True
                self.check(call)

    def check(self, call: Asked) -> None:
        now, value = self.bench.clock.now, call.value
        if call.task.cancelled():
            assert call.is_cancelled
            return
        error = call.task.exception()
        if error is None:
            result, state = call.task.result()
            np.testing.assert_array_equal(result.outputs[0], np.full((value + 1, 4), -value, np.float32))
            if state is CacheState.HIT:
                assert now < self.kept_at[value] + TTL_S
            else:
                assert now == self.kept_at[value]
            return
        assert isinstance(error, ShoalError)
        if isinstance(error, DeadlineExceeded):
            assert now >= call.deadline
        elif isinstance(error, Internal):
            assert self.failed[value]
        else:
            # Only who asked for the execution hears of it.
            self.refused[value] -= 1
            assert self.refused[value] >= 0

    @rule(value=st.sampled_from(VALUES), patience=st.sampled_from([math.inf, math.inf, 1.0, 5.0]))
    def ask(self, value: int, patience: float) -> None:
        async def go() -> asyncio.Task:
            return self.bench.ask(floats(value + 1, 4, value=value), self.bench.clock.now + patience)

        task = self.loop.run_until_complete(go())
        self.calls.append(Asked(value, self.bench.clock.now + patience, task))
        self.settle()

    @precondition(lambda self: self.bench.runs.open)
    @rule(n=st.integers(0, 5))
    def begin(self, n: int) -> None:
        runs = self.bench.runs.open
        runs[n % len(runs)].is_waiting = False

    @precondition(lambda self: self.bench.runs.open)
    @rule(n=st.integers(0, 5))
    def finish(self, n: int) -> None:
        run = self.run(n)
        self.kept_at[self.value(run)] = self.bench.clock.now
        self.succeeded += 1
        self.bench.runs.finish(run)
        self.settle()

    @precondition(lambda self: self.bench.runs.open)
    @rule(n=st.integers(0, 5), is_own=st.booleans())
    def fail(self, n: int, is_own: bool) -> None:
        run = self.run(n)
        (self.failed if is_own else self.refused)[self.value(run)] += 1
        self.bench.runs.finish(run, Internal("the model raised") if is_own else ResourceExhausted("full"))
        self.settle()

    @precondition(lambda self: self.waiting())
    @rule(n=st.integers(0, 20))
    def cancel(self, n: int) -> None:
        waiting = self.waiting()
        call = waiting[n % len(waiting)]
        call.is_cancelled = True
        call.task.cancel()
        self.settle()

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.bench.clock.now += seconds
        self.settle()

    @invariant()
    def nothing_too_much(self) -> None:
        assert 0 <= self.bench.store.size_bytes <= self.limit

    @invariant()
    def nothing_twice(self) -> None:
        for value in VALUES:
            running = [run for run in self.bench.runs.open if self.value(run) == value]
            if not any(call.value == value for call in self.waiting()):
                assert not running
            elif not self.was_refused(value):  # Else some may have joined too often, and run alone.
                assert len(running) <= 1

    @invariant()
    def nobody_forgotten(self) -> None:
        for call in self.waiting():
            assert any(self.value(run) == call.value for run in self.bench.runs.open)

    @invariant()
    def nobody_late(self) -> None:
        for call in self.waiting():
            runs = [run for run in self.bench.runs.open if self.value(run) == call.value]
            assert self.bench.clock.now < call.deadline or not all(run.is_waiting for run in runs)

    @invariant()
    def counted(self) -> None:
        succeeded = [c for c in self.calls if c.task.done() and not c.task.cancelled() and not c.task.exception()]
        told = self.bench.statistics
        assert told.cache_hit.count + told.cache_miss.count == len(succeeded)
        assert told.cache_hit.count == told.success.count  # The rest are the scheduler's to count.
        assert told.cache_miss.count == self.succeeded

    def waiting(self) -> list[Asked]:
        return [call for call in self.calls if not call.task.done()]

    def run(self, n: int) -> Run:
        runs = self.bench.runs.open
        return runs[n % len(runs)]

    def value(self, run: Run) -> int:
        return len(run.request.inputs["x"]) - 1

    def was_refused(self, value: int) -> bool:
        ends = [run.end for run in self.bench.runs.all if self.value(run) == value and run.end.done()]
        return any(not e.cancelled() and isinstance(e.exception(), ResourceExhausted | DeadlineExceeded) for e in ends)


def test_a_request_that_expired_while_a_flight_failed_joins_no_other():
    state = Flights()
    state.start(limit=0)
    for patience in (5.0, 1.0, math.inf):
        state.ask(patience=patience, value=0)
    state.wait(seconds=6.0)  # The first one's execution never began; the third takes off before the second looks.
    state.nobody_late()
    state.teardown()


TestFlights = Flights.TestCase
TestFlights.settings = settings(max_examples=by_form(50, 120), stateful_step_count=40, deadline=None)


class Kept(RuleBasedStateMachine):
    """The store beside the plainest thing that does the same."""

    LIMIT = 9_000

    def __init__(self) -> None:
        super().__init__()
        self.store = ResponseStore(self.LIMIT)
        self.owners = [self.store.owner(), self.store.owner()]
        self.kept: OrderedDict[bytes, tuple[int, int, float, int]] = OrderedDict()
        self.now = 0.0
        self.serial = 0

    @rule(
        owner=st.sampled_from([0, 1]), n=st.integers(0, 9), elements=st.integers(0, 50), ttl=st.sampled_from([5, 500])
    )
    def put(self, owner: int, n: int, elements: int, ttl: float) -> None:
        key, self.serial = bytes([owner, n]), self.serial + 1
        outputs = [np.full(elements, self.serial, np.int64)]
        size = size_bytes(outputs)
        is_kept = self.store.put(self.owners[owner], key, outputs, expires=self.now + ttl)
        assert is_kept == (size <= self.LIMIT // 8)
        if is_kept:
            self.kept.pop(key, None)
            while sum(each[1] for each in self.kept.values()) + size > self.LIMIT:
                self.kept.popitem(last=False)
            self.kept[key] = (owner, size, self.now + ttl, self.serial)

    @rule(owner=st.sampled_from([0, 1]), n=st.integers(0, 9))
    def get(self, owner: int, n: int) -> None:
        key = bytes([owner, n])
        got = self.store.get(self.owners[owner], key, self.now)
        known = self.kept.get(key)
        if known is None or known[2] <= self.now:
            self.kept.pop(key, None)
            assert got is None
        else:
            self.kept.move_to_end(key)
            assert got is not None
            assert set(got[0].tolist()) <= {known[3]}

    @rule(owner=st.sampled_from([0, 1]))
    def reload(self, owner: int) -> None:
        self.store.drop(self.owners[owner])
        self.owners[owner] = self.store.owner()
        for key in [key for key, each in self.kept.items() if each[0] == owner]:
            del self.kept[key]

    @rule(seconds=st.integers(1, 20))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def weighed(self) -> None:
        assert self.store.size_bytes == sum(each[1] for each in self.kept.values()) <= self.LIMIT
        assert len(self.store) == len(self.kept)


TestKept = Kept.TestCase
TestKept.settings = settings(max_examples=by_form(50, 100), stateful_step_count=60, deadline=None)
