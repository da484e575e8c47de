"""Tenants get their shares, levels their order, and nobody waits for ever: the queue alone, told what time it is."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.scheduling import batcher, slo
from services.infer.scheduling.batcher import BatchPolicy, Wait
from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.fairness import MAX_TENANTS, Tenants
from services.infer.scheduling.queue import Batch, Queue, QueuedRequest, QueueLimits
from services.infer.scheduling.rules import Level, Rules
from shoal.errors import ResourceExhausted
from tests.infer.scheduling.virtual_time import call
from tests.long_form import by_form


class Receiver:
    """Nobody is told: the queue never tells."""

    is_direct = False
    writes = False

    def succeeded(self, result) -> None:
        raise AssertionError

    failed = succeeded


def queue(max_rows: int = 4, rules: Rules | None = None, **limits: int) -> Queue:
    return Queue("m", QueueLimits(**limits), BatchPolicy(max_rows, 1 << 20), rules or Rules(), CostCurve())


def add(
    to: Queue, tenant: str = "", rows: int = 1, *, at: float = 0.0, level: int = 0, key: object = "k"
) -> QueuedRequest:
    pending = QueuedRequest(call(1, rows, key=key), at, math.inf, Receiver())
    pending.level = level
    for victim in to.add(pending, tenant, lambda: 7):
        assert not victim.is_waiting
    return pending


def take(of: Queue, at: float = 0.0) -> Batch:
    batch = of.take(at)
    assert not isinstance(batch, Wait)
    return batch


@settings(max_examples=by_form(50, 100), deadline=None)
@given(
    sizes=st.dictionaries(
        st.sampled_from("abcde"), st.lists(st.integers(1, 4), min_size=40, max_size=60), min_size=2, max_size=5
    ),
    weights=st.dictionaries(st.sampled_from("abcde"), st.sampled_from([0.5, 1.0, 3.0, 10.0])),
    max_rows=st.integers(1, 16),
    late=st.sampled_from("abcde"),
)
def test_tenants_that_all_wait_get_rows_by_weight(sizes, weights, max_rows, late):
    to = queue(max_rows, Rules(weights=weights))
    weight = {tenant: weights.get(tenant, 1.0) for tenant in sizes}
    for tenant, rows in sizes.items():
        if tenant == late:
            continue  # It comes when the others have been served for a while, and claims nothing for that time.
        for each in rows:
            add(to, tenant, each)
    for _ in range(3):
        take(to)
    for each in sizes.get(late, ()):
        add(to, late, each)
    served = dict.fromkeys(sizes, 0.0)
    left = {tenant: sum(p.rows for p in pendings(to, tenant)) for tenant in sizes}
    while min(left.values()) > 0:
        for pending in take(to).requests:
            tenant = pending.tenant
            served[tenant] += pending.rows / weight[tenant]
            left[tenant] -= pending.rows
    # The bound of start-time fair queueing: one call of each of two tenants. Whoever was there before may also be ahead
    # by one batch, which ran just before.
    for one in served:
        for other in served:
            bound = 4 / weight[one] + 4 / weight[other] + (max_rows + 4) / min(weight[one], weight[other])
            assert abs(served[one] - served[other]) <= bound


def pendings(of: Queue, tenant: str) -> list[QueuedRequest]:
    return [p for lane in of._groups.values() for p in lane.order() if p.tenant == tenant]


def test_a_late_tenant_gets_no_credit_for_the_past():
    to = queue(max_rows=1)
    for _ in range(50):
        add(to, "old")
    for _ in range(20):
        take(to)
    for _ in range(10):
        add(to, "new")
    tenants = [take(to).requests[0].tenant for _ in range(10)]
    assert tenants.count("new") == 5


def test_tenants_with_different_shapes_alternate():
    to = queue(max_rows=4)
    for _ in range(40):
        add(to, "flood", key="a")
    add(to, "late", at=1.0, key="b")
    first, second = take(to, 1.0), take(to, 1.0)
    assert "late" in {call.tenant for batch in (first, second) for call in batch.requests}


def test_one_tenant_cannot_fill_the_queue_for_others():
    to = queue(calls=10)
    flood = [add(to, "flood") for _ in range(10)]
    with pytest.raises(ResourceExhausted) as err:
        add(to, "flood")
    assert err.value.retry_after_ms == 7
    late = [add(to, "late") for _ in range(5)]
    assert all(pending.is_waiting for pending in late)
    # The newest of the flood gave way, and only down to its share.
    assert [pending.is_waiting for pending in flood] == [True] * 5 + [False] * 5
    with pytest.raises(ResourceExhausted):
        add(to, "late")
    assert len(to) == 10


def test_requests_of_worse_levels_are_evicted_for_memory():
    to = queue(rules=Rules(levels=(Level(), Level())), size_bytes=80)
    low = [add(to, level=1) for _ in range(10)]
    high = add(to, level=0, rows=3)
    assert high.is_waiting
    assert [pending.is_waiting for pending in low] == [True] * 7 + [False] * 3
    with pytest.raises(ResourceExhausted):
        add(to, level=1)


def test_a_tenant_that_fills_the_memory_with_few_large_requests_does_not_shut_others_out():
    to = queue(size_bytes=400)
    flood = [add(to, "flood", rows=24), add(to, "flood", rows=24)]
    assert all(add(to, "other").is_waiting for _ in range(10))
    assert [pending.is_waiting for pending in flood] == [True, False]


def test_requests_of_worse_levels_of_another_tenant_are_not_evicted_for_memory():
    to = queue(rules=Rules(levels=(Level(), Level())), size_bytes=80)
    low = [add(to, "low", level=1) for _ in range(4)]
    for _ in range(6):
        add(to, "high", level=0)
    with pytest.raises(ResourceExhausted):
        add(to, "high", level=0)
    assert all(pending.is_waiting for pending in low)
    # The tenant that holds more gives way, whatever its level.
    assert add(to, "low", level=1).is_waiting


def test_the_first_level_of_a_tenant_leaves_another_tenant_its_share():
    to = queue(max_rows=1, rules=Rules(levels=(Level(), Level()), aging_s=math.inf))
    for n in range(40):
        add(to, "first", level=0, key=n % 2)
    for n in range(20):
        add(to, "other", level=n % 2, key=n % 2)
    ran = [take(to).requests[0] for _ in range(40)]
    assert [pending.tenant for pending in ran].count("other") == 20
    # A tenant's own requests go by level.
    assert [pending.level for pending in ran if pending.tenant == "other"] == [0] * 10 + [1] * 10


def test_a_batch_has_requests_of_all_tenants_and_of_each_the_best_level():
    to = queue(max_rows=4, rules=Rules(levels=(Level(), Level()), aging_s=math.inf))
    worse = [add(to, tenant, level=1) for tenant in ("a", "a", "b", "b")]
    better = [add(to, tenant, level=0) for tenant in ("a", "b")]
    batch = take(to).requests
    assert {id(each) for each in batch} == {id(each) for each in (*better, worse[0], worse[2])}


@pytest.mark.parametrize(("policy", "decider"), [({"slo_s": 0.05}, slo), ({"delay_s": 0.05}, batcher)])
def test_a_decision_examines_few_of_many_shapes(monkeypatch, policy, decider):
    decide = Mock(wraps=decider.decide)
    monkeypatch.setattr(decider, "decide", decide)

    def examined(shapes: int) -> int:
        to = Queue("m", QueueLimits(), BatchPolicy(8, 1 << 20, **policy), Rules(), CostCurve())
        for shape in range(shapes):
            add(to, key=shape)
        decide.reset_mock()
        take(to, at=1.0)
        return decide.call_count

    # The 16 shapes that are most urgent, or have waited longest, are candidates, and the one whose turn it is.
    assert (examined(2), examined(16)) == (2, 16)
    assert 16 <= examined(300) <= 17


def test_each_level_has_its_own_bound():
    to = queue(rules=Rules(levels=(Level(), Level(calls=2))))
    add(to, level=1)
    add(to, level=1)
    with pytest.raises(ResourceExhausted, match="2 requests wait"):
        add(to, level=1)
    add(to, level=0)


def test_levels_go_in_order_and_share_batches():
    to = queue(max_rows=2, rules=Rules(levels=(Level(), Level(), Level())))
    low, middle, high = (add(to, level=level) for level in (2, 1, 0))
    other = add(to, level=0)
    assert [list(take(to).requests), list(take(to).requests)] == [[high, other], [middle, low]]


@given(aging_s=st.sampled_from([0.5, 1.0, 4.0]), levels=st.integers(2, 5), step_s=st.sampled_from([0.1, 0.25]))
def test_the_last_level_is_served_after_a_bounded_time_under_any_load(aging_s, levels, step_s):
    to = queue(max_rows=1, rules=Rules(levels=(Level(),) * levels, aging_s=aging_s))
    low = add(to, level=levels - 1)
    now = 0.0
    while low.is_waiting:
        add(to, at=now)
        take(to, now)
        now += step_s
        assert now <= aging_s * (levels - 1) + 2 * step_s


def test_without_aging_levels_are_strict():
    to = queue(max_rows=1, rules=Rules(levels=(Level(), Level()), aging_s=math.inf))
    low = add(to, level=1)
    for n in range(1, 100):
        add(to, at=n * 1000.0)
        take(to, n * 1000.0)
    assert low.is_waiting


def test_a_delayed_request_runs_after_its_level_and_before_the_next():
    levels = (Level(timeout_s=1.0, delays=True), Level())
    to = queue(max_rows=1, rules=Rules(levels=levels, aging_s=math.inf))
    early = add(to)
    early.yields_at = 1.0
    to._yielding.add(1.0, early)
    below = add(to, level=1)
    fresh = add(to, at=0.9)
    assert to.next_expiry() == 1.0
    assert to.expire(1.0) == []
    assert [take(to, 1.0).requests[0] for _ in range(3)] == [fresh, early, below]


def test_idle_tenants_are_dropped():
    to = queue(max_rows=1, calls=10_000)
    for n in range(5 * MAX_TENANTS):
        add(to, f"t{n}")
        take(to)
    assert len(to._tenants) <= MAX_TENANTS
    for n in range(2 * MAX_TENANTS):
        add(to, f"w{n}")
    assert len(to._tenants) <= MAX_TENANTS
    assert len(to) == 2 * MAX_TENANTS
    while len(to):
        take(to)


def test_a_tenant_without_requests_does_not_wait():
    tenants = Tenants({})
    assert tenants.of("", 0) is tenants.of("", 0)
    assert tenants.waiting() == []


@settings(max_examples=by_form(60, 150), deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "add", "add", "take", "discard", "expire"]), st.integers(0, 1 << 30)),
        max_size=120,
    ),
    goal=st.sampled_from([math.inf, 5.0]),
    calls=st.sampled_from([4, 2048]),
)
def test_the_queues_counts_hold_under_any_operations(steps, goal, calls):
    rules = Rules(levels=(Level(), Level(timeout_s=3.0, delays=True)), aging_s=2.0, weights={"t0": 3.0})
    to = Queue("m", QueueLimits(calls, 1 << 20), BatchPolicy(4, 100, slo_s=goal), rules, CostCurve())
    here: list[QueuedRequest] = []
    for now, (step, dice) in enumerate(steps):
        at = float(now)
        if step == "add":
            pending = QueuedRequest(call(1, dice % 4 + 1, key=dice % 5), at, at + dice % 9 + 1, Receiver())
            pending.level = dice % 2
            pending.yields_at = at + 3.0 if pending.level else math.inf
            pending.due = at + dice % 7 if goal != math.inf else math.inf
            try:
                gone = to.add(pending, f"t{dice % 6}", lambda: 1)
            except ResourceExhausted:
                continue
            here = [other for other in here if other not in gone] + [pending]
        elif step == "take":
            batch = to.take(at, is_late=True)
            if isinstance(batch, Batch):
                assert all(other in here for other in batch.requests)
                here = [other for other in here if other not in batch.requests]
        elif step == "discard" and here:
            assert to.discard(here.pop(dice % len(here)))
        elif step == "expire":
            gone = to.expire(at)
            assert all(other.expires <= at for other in gone)
            here = [other for other in here if other not in gone]
            assert all(other.expires > at for other in here)
        check(to, here)


def check(of: Queue, here: list[QueuedRequest]) -> None:
    assert len(of) == len(here)
    assert (of.rows, of.size_bytes) == (sum(p.rows for p in here), sum(p.size_bytes for p in here))
    assert {id(p) for lane in of._groups.values() for p in lane.order()} == {id(p) for p in here}
    assert all(lane.rows == sum(p.rows for p in lane.order()) > 0 for lane in of._groups.values())
    waiting = of._tenants.waiting()
    first = of._tenants.first()
    assert (first is None) == (not waiting)
    if first is not None:
        assert first.virtual_time == min(tenant.virtual_time for tenant in waiting)
    for tenant in waiting:
        own = [p for p in here if p.tenant_queue.tenant is tenant]
        assert (tenant.count, tenant.rows, tenant.size_bytes) == (
            len(own),
            sum(p.rows for p in own),
            sum(p.size_bytes for p in own),
        )
        for band, tenant_queue in tenant.queues.items():
            in_band = [p for p in own if p.tenant_queue is tenant_queue]
            assert (tenant_queue.count, tenant_queue.rows) == (len(in_band), sum(p.rows for p in in_band))
            assert {id(p) for p in in_band} <= {id(p) for p in tenant_queue.order}
            assert all(p.band == band for p in in_band)
