"""A full queue rejects and evicts without a look at the requests that stay."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rpc.call_context import RequestMemory
from services.infer.scheduling.queue import Queue, QueuedRequest
from services.infer.scheduling.rules import Level, Rules
from shoal.errors import ResourceExhausted
from tests.infer.scheduling.test_fairness_property import Receiver, queue
from tests.infer.scheduling.virtual_time import call

WAITING = 2048


class Observed(QueuedRequest):
    """A queued request that counts the looks at it: reads of an attribute, and comparisons."""

    looks: ClassVar[Counter[int]] = Counter()
    """By id of the request."""
    made: ClassVar[list[Observed]] = []
    """All of a test, so that none gets the id of one that is gone."""

    def __getattribute__(self, name: str) -> Any:
        Observed.looks[id(self)] += 1
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        Observed.looks[id(self)] += 1
        return self is other

    __hash__ = object.__hash__


def observed(at: float, key: object = "k") -> Observed:
    new = Observed(call(1, 1, key=key), at, math.inf, Receiver())
    Observed.made.append(new)
    return new


def full(tenants: list[str], rules: Rules | None = None, keys: int = 1) -> Queue:
    waiting = queue(rules=rules)
    Observed.made.clear()
    for n in range(WAITING):
        waiting.add(observed(float(n), f"k{n % keys}"), tenants[n % len(tenants)], lambda: 7)
    Observed.looks.clear()
    return waiting


def looked_at(except_for: QueuedRequest) -> int:
    return len(Observed.looks.keys() - {id(except_for)})


@pytest.mark.parametrize("tenants", [["a", "b"], ["a"], [f"t{n}" for n in range(1000)]], ids=["two", "one", "1000"])
@pytest.mark.parametrize("keys", [1, 20])
def test_a_rejection_looks_at_no_more_than_the_newest_requests_and_the_next_in_line(
    tenants: list[str], keys: int
) -> None:
    waiting = full(tenants, keys=keys)
    for n in range(20):
        new = observed(9000.0 + n)
        Observed.looks.clear()
        with pytest.raises(ResourceExhausted):
            waiting.add(new, tenants[0], lambda: 7)
        assert looked_at(new) <= 3
    assert len(waiting) == WAITING


@pytest.mark.parametrize("delays", [False, True])
def test_an_eviction_looks_at_a_few_requests_only(*, delays: bool) -> None:
    waiting = full(["a"], Rules((Level(delays=delays),)), keys=20)
    for n in range(20):
        new = observed(9000.0 + n)
        Observed.looks.clear()
        (victim,) = waiting.add(new, "b", lambda: 7)
        # The evicted request and the next one, and the first and last ones of the new one's tenant.
        assert looked_at(new) <= 5
        assert victim.arrived == WAITING - 1 - n
    assert len(waiting) == WAITING


def test_the_newest_request_is_evicted_after_others_of_its_tenant_have_run() -> None:
    waiting = full(["a"], keys=4)
    ran = waiting.take(0.0).requests  # type: ignore[union-attr]
    for n in range(len(ran)):
        waiting.add(observed(9000.0 + n, "k3"), "a", lambda: 7)
    (victim,) = waiting.add(observed(9999.0), "b", lambda: 7)
    assert victim.arrived == 9000.0 + len(ran) - 1


class Sender:
    """Memory of the calls of one connection."""

    def __init__(self, name: str) -> None:
        self.sender = name


def sent(at: float, sender: str, rows: int = 1, key: object = "k") -> QueuedRequest:
    request = call(1, rows, key=key)
    request.memory = cast("RequestMemory", Sender(sender))
    return QueuedRequest(request, at, math.inf, Receiver())


def taken(waiting: Queue) -> list[QueuedRequest]:
    return list(waiting.take(0.0).requests)  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["k", "other"])
def test_a_connection_that_fills_the_queue_does_not_delay_or_reject_another_one_of_its_tenant(key: str) -> None:
    waiting = queue()
    flood = [sent(float(n), "flood") for n in range(WAITING)]
    for each in flood:
        waiting.add(each, "t", lambda: 7)
    with pytest.raises(ResourceExhausted):
        waiting.add(sent(8999.0, "flood"), "t", lambda: 7)
    one = sent(9000.0, "one", key=key)
    (victim,) = waiting.add(one, "t", lambda: 7)
    assert victim is flood[-1]
    # Those that came first are less than two batches.
    assert any(one in taken(waiting) for _ in range(3))
    ran = []
    while len(waiting):
        ran += taken(waiting)
    assert ran == sorted(ran, key=lambda queued: queued.arrived)


def test_connections_of_a_tenant_share_a_full_queue_and_its_batches() -> None:
    waiting = queue()
    evicted: Counter[str] = Counter()
    for n in range(3 * WAITING):
        name = "abcd"[min(n // WAITING, 1) * (n % 3 + 1)]
        try:
            victims = waiting.add(sent(float(n), name), "t", lambda: 7)
        except ResourceExhausted:
            continue
        evicted.update(victim.request.memory.sender for victim in victims)
    assert set(evicted) == {"a"}
    batches = [Counter(each.request.memory.sender for each in taken(waiting)) for _ in range(10)]
    # The first ones are those that came while less than a batch waited.
    for batch in batches[2:]:
        assert set(batch) == set("abcd")
        assert max(batch.values()) - min(batch.values()) <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 5), st.sampled_from("xy")),
            st.tuples(st.just("take")),
            st.tuples(st.just("leave"), st.integers(0, 10_000)),
        ),
        max_size=400,
    )
)
def test_each_request_of_some_connections_leaves_the_queue_once_and_in_the_order_of_its_connection(steps: Any) -> None:
    waiting = queue()
    live: list[QueuedRequest] = []
    ran: list[QueuedRequest] = []
    added = left = 0
    for at, (what, *more) in enumerate(steps):
        if what == "add":
            sender, rows, key = more
            live.append(sent(float(at), sender, rows, key))
            assert not waiting.add(live[-1], "t", lambda: 7)
            added += 1
        elif what == "take" and len(waiting):
            ran += (batch := taken(waiting))
            live = [each for each in live if each not in batch]
        elif what == "leave" and live:
            assert waiting.discard(live.pop(more[0] % len(live)))
            left += 1
    while len(waiting):
        ran += taken(waiting)
    assert len(ran) == len(set(map(id, ran))) == added - left
    assert (waiting.rows, waiting.size_bytes) == (0, 0)
    for sender in "abc":
        for key in "xy":
            own = [each for each in ran if each.request.memory.sender == sender and each.request.key == key]
            assert own == sorted(own, key=lambda each: each.arrived)
