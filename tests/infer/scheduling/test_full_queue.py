"""A full queue rejects and evicts without a look at the requests that stay."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, ClassVar

import pytest

from services.infer.scheduling.queue import Queue, QueuedRequest
from services.infer.scheduling.rules import Level, Rules
from shoal.errors import ResourceExhausted
from tests.infer.scheduling.test_fairness_property import Receiver, queue
from tests.infer.scheduling.virtual_time import call

WAITING = 2048


class Observed(QueuedRequest):
    """A queued request that counts the looks at it: reads of an attribute, and comparisons."""

    looks: ClassVar[Counter[int]] = Counter()

    def __getattribute__(self, name: str) -> Any:
        Observed.looks[id(self)] += 1
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        Observed.looks[id(self)] += 1
        return self is other

    __hash__ = object.__hash__


def observed(at: float, key: object = "k") -> Observed:
    return Observed(call(1, 1, key=key), at, math.inf, Receiver())


def full(tenants: list[str], rules: Rules | None = None, keys: int = 1) -> Queue:
    waiting = queue(rules=rules)
    for n in range(WAITING):
        waiting.add(observed(float(n), f"k{n % keys}"), tenants[n % len(tenants)], lambda: 7)
    Observed.looks.clear()
    return waiting


def looked_at(except_for: QueuedRequest) -> int:
    return len(Observed.looks.keys() - {id(except_for)})


@pytest.mark.parametrize("tenants", [["a", "b"], ["a"], [f"t{n}" for n in range(1000)]], ids=["two", "one", "1000"])
@pytest.mark.parametrize("keys", [1, 20])
def test_a_rejection_looks_at_no_more_than_the_newest_request(tenants: list[str], keys: int) -> None:
    waiting = full(tenants, keys=keys)
    for n in range(20):
        new = observed(9000.0 + n)
        with pytest.raises(ResourceExhausted):
            waiting.add(new, tenants[0], lambda: 7)
        assert looked_at(new) <= 2
    assert len(waiting) == WAITING


@pytest.mark.parametrize("delays", [False, True])
def test_an_eviction_looks_at_the_evicted_request_only(*, delays: bool) -> None:
    waiting = full(["a"], Rules((Level(delays=delays),)), keys=20)
    for n in range(20):
        new = observed(9000.0 + n)
        Observed.looks.clear()
        (victim,) = waiting.add(new, "b", lambda: 7)
        # The evicted request, and the next in line.
        assert looked_at(new) <= 2
        assert victim.arrived == WAITING - 1 - n
    assert len(waiting) == WAITING


def test_the_newest_request_is_evicted_after_others_of_its_tenant_have_run() -> None:
    waiting = full(["a"], keys=4)
    ran = waiting.take(0.0).requests  # type: ignore[union-attr]
    for n in range(len(ran)):
        waiting.add(observed(9000.0 + n, "k3"), "a", lambda: 7)
    (victim,) = waiting.add(observed(9999.0), "b", lambda: 7)
    assert victim.arrived == 9000.0 + len(ran) - 1
