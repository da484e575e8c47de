"""Who is claimed next, on a simulated queue and clock: shares stay within bounds, and nobody starves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest.dispatch.tenant_queues import QUEUES_PER_CLAIM, TenantQueues
from services.ingest.job_store import Waiting
from services.ingest.tenant_queue import TenantQueueKey
from tests.ingest.making import START, TestClock

AGEING = timedelta(seconds=60)
LISTS_EVERY = timedelta(milliseconds=100)


class Queue:
    """What MongoDB has: lanes in order of due times."""

    def __init__(self) -> None:
        self.queues: dict[TenantQueueKey, list[Waiting]] = {}
        self._ids = itertools.count()
        self._lane_of: dict[str, TenantQueueKey] = {}

    def put(self, lane: TenantQueueKey, due_at=START, jobs: int = 1) -> list[str]:
        ids = [f"{next(self._ids):026}" for _ in range(jobs)]
        self._lane_of.update(dict.fromkeys(ids, lane))
        self.queues.setdefault(lane, []).extend((due_at, id_) for id_ in ids)
        self.queues[lane].sort()
        return ids

    def head(self, lane: TenantQueueKey, now, limit: int) -> list[Waiting]:
        return [job for job in self.queues.get(lane, [])[:limit] if job[0] <= now]

    def due(self, now, closed=()) -> list[tuple[TenantQueueKey, Waiting]]:
        return [
            (lane, job)
            for lane, jobs in self.queues.items()
            for job in jobs
            if job[0] <= now and lane.model not in closed
        ]

    def take(self, ids: Iterable[str]) -> list[tuple[TenantQueueKey, Waiting]]:
        wanted = frozenset(ids)
        taken = []
        for lane in {self._lane_of[id_] for id_ in ids}:
            jobs = self.queues.pop(lane)
            taken += [(lane, job) for job in jobs if job[1] in wanted]
            if kept := [job for job in jobs if job[1] not in wanted]:
                self.queues[lane] = kept
        return taken


class Claimer:
    """What `claims.Claims` does around the decisions."""

    def __init__(self, queue: Queue, clock: TestClock, weights: dict[str, float]) -> None:
        self._queue = queue
        self._clock = clock
        self.queues = TenantQueues(lambda tenant: weights.get(tenant, 1.0), AGEING)
        self._listed_at = START - timedelta(days=1)

    def claim(self, capacity: int, closed: frozenset[str] = frozenset()) -> list[tuple[TenantQueueKey, Waiting]]:
        is_listed = self._clock.now - self._listed_at >= LISTS_EVERY
        if is_listed:
            self._list()
        taken = self._claim_known(capacity, closed)
        if not taken and not is_listed:
            self._list()
            taken = self._claim_known(capacity, closed)
        return taken

    def _claim_known(self, capacity: int, closed: frozenset[str]) -> list[tuple[TenantQueueKey, Waiting]]:
        now = self._clock.now
        shares = self.queues.plan(capacity, now, closed)
        assert sum(len(share.queues) for share in shares) <= QUEUES_PER_CLAIM
        assert sum(share.jobs for share in shares) == (capacity if shares else 0)
        seen = {lane: self._queue.head(lane, now, share.limit(1)) for share in shares for lane in share.queues}
        ids = self.queues.pick(shares, seen)
        assert len(ids) == len(set(ids)) <= capacity
        taken = self._queue.take(ids)
        for tenant, jobs in Counter(lane.tenant for lane, _ in taken).items():
            self.queues.charge(tenant, jobs)
        return taken

    def _list(self) -> None:
        self._listed_at = self._clock.now
        self.queues.set_heads((lane, jobs[0][0]) for lane, jobs in self._queue.queues.items())


def lane(tenant: str, model: str = "m", priority: int = 0) -> TenantQueueKey:
    return TenantQueueKey(tenant, model, priority)


@given(
    weights=st.lists(st.sampled_from([0.1, 0.5, 1, 1, 2, 7]), min_size=2, max_size=8),
    rooms=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    claimers=st.integers(1, 3),
)
@settings(max_examples=40)
def test_tenants_that_wait_together_share_by_weight(weights: list[float], rooms: list[int], claimers: int) -> None:
    queue, clock = Queue(), TestClock()
    shares = {f"t{n}": weight for n, weight in enumerate(weights)}
    for tenant in shares:
        queue.put(lane(tenant), jobs=1_250)  # More than all claims take: all of them wait all the time.
    workers = [Claimer(queue, clock, shares) for _ in range(claimers)]
    served: Counter[str] = Counter()
    for capacity in rooms:
        for worker in workers:
            taken = worker.claim(capacity)
            assert len(taken) == capacity
            served.update(one.tenant for one, _ in taken)
        for a, b in itertools.combinations(shares, 2):
            apart = abs(served[a] / shares[a] - served[b] / shares[b])
            assert apart <= claimers * (1 / shares[a] + 1 / shares[b]) + 1e-6


@given(
    backlog=st.integers(100, 1_000),
    before=st.integers(0, 20),
    capacity=st.integers(1, 64),
    weight=st.sampled_from([0.5, 1, 3]),
    others=st.integers(1, 5),
)
@settings(max_examples=30)
def test_ten_jobs_do_not_wait_for_anybodys_backlog(
    backlog: int, before: int, capacity: int, weight: float, others: int
) -> None:
    queue, clock = Queue(), TestClock()
    worker = Claimer(queue, clock, {"small": weight})
    for n in range(others):
        queue.put(lane(f"big{n}"), START - timedelta(hours=1), jobs=backlog)
    for _ in range(before):
        worker.claim(capacity)
    clock.advance(seconds=1)
    ten = set(queue.put(lane("small"), clock.now, jobs=10))
    claimed = 0
    while ten:
        taken = worker.claim(capacity)
        claimed += len(taken)
        ten -= {job[1] for _, job in taken}
    # Its share of what is claimed, and the last claim in full: whatever waits besides.
    assert claimed <= 10 * (weight + others) / weight + others / weight + others + 1 + capacity


def test_a_tenant_with_few_jobs_saves_up_no_credit_and_what_it_leaves_goes_to_others() -> None:
    queue, clock = Queue(), TestClock()
    worker = Claimer(queue, clock, {})
    queue.put(lane("big"), START - timedelta(hours=1), jobs=2_000)

    def served() -> tuple[int, int]:
        tenants = Counter(one.tenant for one, _ in worker.claim(100))
        return tenants["big"], tenants["small"]

    for _ in range(10):
        clock.advance(seconds=1)
        queue.put(lane("small"), clock.now, jobs=2)
        assert served() == (98, 2)
    clock.advance(seconds=1)
    queue.put(lane("small"), clock.now, jobs=1_000)
    big, small = served()
    assert big + small == 100
    assert abs(big - small) <= 2


def test_an_idle_tenant_takes_turns_beside_a_backlog_and_pays_for_them() -> None:
    queue, clock = Queue(), TestClock()
    worker = Claimer(queue, clock, {})
    queue.put(lane("big"), START - timedelta(hours=1), jobs=2_000)
    for claimed, turns in ((100, 64), (20, 20), (100, 64)):
        assert len(worker.claim(claimed)) == claimed
        assert sum(worker.queues.take_turn("small") for _ in range(200)) == turns
        assert not worker.queues.take_turn("big")
    queue.put(lane("small"), START, jobs=100)
    clock.advance(seconds=1)
    assert {one.tenant for one, _ in worker.claim(60)} == {"big"}
    assert not worker.queues.take_turn("small")
    assert {one.tenant for one, _ in worker.claim(60)} == {"big", "small"}


def test_with_more_tenants_than_a_claim_reads_each_has_its_turn() -> None:
    queue, clock = Queue(), TestClock()
    worker = Claimer(queue, clock, {})
    tenants = [f"t{n}" for n in range(5 * QUEUES_PER_CLAIM)]
    for tenant in tenants:
        queue.put(lane(tenant), jobs=40)
    served: Counter[str] = Counter()
    for _ in range(5):
        served.update(one.tenant for one, _ in worker.claim(128))
    assert served == dict.fromkeys(tenants, 2)


jobs_of_one = st.lists(
    st.tuples(st.sampled_from(["m", "n"]), st.integers(-2, 1), st.integers(-400, 100)), min_size=1, max_size=60
)


@given(jobs=jobs_of_one, capacity=st.integers(1, 20), step_s=st.integers(0, 30))
@settings(max_examples=60)
def test_a_tenants_jobs_go_by_age_and_priority_and_none_is_left(
    jobs: list[tuple[str, int, int]], capacity: int, step_s: int
) -> None:
    queue, clock = Queue(), TestClock()
    worker = Claimer(queue, clock, {})
    for model, priority, due_s in jobs:
        queue.put(lane("t", model, priority), START + timedelta(seconds=due_s))
    while queue.queues:
        order = sorted((one.age(job[0], AGEING), job[1]) for one, job in queue.due(clock.now))
        taken = {job[1] for _, job in worker.claim(capacity)}
        assert taken == {id_ for _, id_ in order[:capacity]}
        clock.advance(seconds=step_s if order else 100)


@given(data=st.data(), capacity=st.integers(1, 30))
@settings(max_examples=30)
def test_what_is_due_and_open_is_found_whoever_put_it_there_and_whenever(data: st.DataObject, capacity: int) -> None:
    """A claim comes back with nothing only when nothing is there, and never with what is closed or not due."""
    queue, clock = Queue(), TestClock()
    workers = [Claimer(queue, clock, {"a": 3}) for _ in range(2)]
    queues = st.builds(TenantQueueKey, st.sampled_from("abc"), st.sampled_from(["m", "n"]), st.integers(-1, 1))
    for _ in range(15):
        for one, after_s, jobs in data.draw(
            st.lists(st.tuples(queues, st.integers(-5, 5), st.integers(1, 20)), max_size=3)
        ):
            queue.put(one, clock.now + timedelta(seconds=after_s), jobs)
        closed = data.draw(st.sampled_from([frozenset(), frozenset("m"), frozenset("mn")]))
        due = queue.due(clock.now, closed)
        taken = data.draw(st.sampled_from(workers)).claim(capacity, closed)
        assert all(job in due for job in taken)
        assert bool(taken) == bool(due)
        clock.advance(milliseconds=data.draw(st.sampled_from([0, 30, 1_000])))


@pytest.mark.parametrize("is_noticed", [True, False])
def test_what_was_noticed_during_a_claim_is_not_forgotten_by_it(is_noticed: bool) -> None:
    queues = TenantQueues(lambda tenant: 1.0, AGEING)
    queues.set_heads([(lane("t"), START)])
    shares = queues.plan(10, START, ())
    if is_noticed:
        queues.add_head(lane("t"), START)  # Put there after the lane was read.
    assert queues.pick(shares, {lane("t"): [(START, "x")]}) == ["x"]
    assert queues.has_due(START, ()) == is_noticed


def test_claimers_in_a_crowd_do_not_all_take_the_head() -> None:
    seen = {lane("t"): [(START, f"{n:03}") for n in range(401)]}
    picks = []
    for _ in range(2):
        queues = TenantQueues(lambda tenant: 1.0, AGEING)
        queues.set_heads([(lane("t"), START)])
        picks.append(set(queues.pick(queues.plan(100, START, (), 4), seen, 4)))
    assert all(len(pick) == 100 and max(pick) > "150" for pick in picks)
    assert len(picks[0] & picks[1]) < 60
