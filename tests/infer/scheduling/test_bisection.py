"""Only the guilty fail, and finding them is cheap."""

from __future__ import annotations

import asyncio
import math

from hypothesis import given
from hypothesis import strategies as st

from services.infer.scheduling.bisection import Bisection


class Guilt(Exception): ...


class Model:
    """Doubles; fails for a batch with a guilty number."""

    def __init__(self, guilty: set[int]) -> None:
        self.guilty = guilty
        self.runs = 0

    def run(self, batch: list[int]) -> list[object]:
        self.runs += 1
        if self.guilty.intersection(batch):
            raise Guilt
        return [2 * number for number in batch]


@given(size=st.integers(2, 300), guilty=st.sets(st.integers(0, 299)))
def test_only_failing_items_fail_in_a_bounded_number_of_runs(size, guilty):
    model = Model(guilty)
    outcomes = Bisection(lambda err: "guilty").outcomes(list(range(size)), model.run)
    assert outcomes == ["guilty" if number in guilty else 2 * number for number in range(size)]
    assert model.runs <= size + 4 * math.log2(size) + 8


@given(size=st.integers(2, 1024), guilty=st.integers(0, 1023))
def test_one_failing_item_of_many_is_found_in_about_two_log_n_runs(size, guilty):
    model = Model({guilty % size})
    search = Bisection(lambda err: "guilty")
    search.outcomes(list(range(size)), model.run)
    assert model.runs <= 2 * math.ceil(math.log2(size))
    assert search.cuts <= math.ceil(math.log2(size))


@given(size=st.integers(2, 100), guilty=st.sets(st.integers(0, 99)))
def test_awaited_runs_are_the_same_as_blocking_runs(size, guilty):
    model, other = Model(guilty), Model(guilty)

    async def run(batch: list[int]) -> list[object]:
        return other.run(batch)

    batch = list(range(size))
    awaited = asyncio.run(Bisection(lambda err: "guilty").outcomes_async(batch, run))
    assert awaited == Bisection(lambda err: "guilty").outcomes(batch, model.run)
    assert other.runs == model.runs


def test_stop_iteration_is_a_failure_like_any_other():
    def run(batch: list[int]) -> list[object]:
        raise StopIteration

    assert Bisection(lambda err: type(err)).outcomes([1, 2], run) == [StopIteration, StopIteration]
