"""Deadlines of calls, without a clock."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.client.transport.deadline import LONGEST_S, Deadline
from shoal.errors import InvalidArgument


def test_time_runs_out_once() -> None:
    deadline = Deadline.after(5, 100.0)
    assert [deadline.left_s(now) for now in (100.0, 104.0, 105.0, 200.0)] == [5.0, 1.0, 0.0, 0.0]


def test_none_is_no_limit() -> None:
    deadline = Deadline.after(None, 100.0)
    assert (deadline.left_s(1e9), deadline.at) == (None, math.inf)


def test_an_infinite_limit_is_the_longest_that_grpc_can_send() -> None:
    assert Deadline.after(math.inf, 0.0).left_s(0.0) == LONGEST_S


def test_a_part_of_a_call_never_outlasts_the_call() -> None:
    deadline = Deadline.after(5, 100.0)
    assert deadline.capped(10, 100.0) is deadline
    assert deadline.capped(1, 102.0) == Deadline(1, 103.0)
    assert Deadline.after(None, 0.0).capped(10, 100.0) == Deadline(10, 110.0)


@pytest.mark.parametrize("wrong", [-1, math.nan, "5", [1]])
def test_a_limit_that_is_no_duration_is_named(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"timeout=.*: expected seconds, 0 or more, or None"):
        Deadline.after(wrong, 0.0)
