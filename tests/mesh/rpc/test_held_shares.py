"""Shares of limits in simulated time: what is admitted, what is refused, and what is left when every call has ended."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.rpc import held_shares as module
from mesh.rpc.access import Access
from mesh.rpc.held_shares import FORGOTTEN_AFTER_S, PROVISIONAL_PARTS, CallLimits, HeldShares, Reservation
from services.coord.shares import Shares
from shoal.access import tokens
from shoal.access.caller_header import SERVICE
from shoal.access.limits import Amount, Bucket, Kind
from shoal.access.tokens import Signer
from shoal.errors import Cancelled, DeadlineExceeded, Internal, LimitReached, ResourceExhausted, Unavailable
from tests.access.policies import claims_of, key, passed, policy

NUMBERS: dict[str, Any] = {
    "requests_in_flight": 4,
    "bytes_per_second": 1000,
    "burst_bytes": 2000,
    "rows_per_second": 10,
    "burst_rows": 30,
}
ALL = {"name": "all", **NUMBERS}
SHED = ResourceExhausted("the queue is full", retry_after_ms=10)
GONE = Unavailable("gone", retry_after_ms=5)
IS_SHED = (SHED, GONE)
ENDS = (None, SHED, Internal("x"), Cancelled("x"), DeadlineExceeded("x"), GONE)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


class World:
    """Access with limits, at a time that the test sets."""

    def __init__(self, signer: Signer, *limits: dict[str, Any], part: float | None = 1.0) -> None:
        self.now = 1000.0
        self.new = 0
        self.signer = signer
        self.shares = HeldShares(tuple(Kind), (Kind.IN_FLIGHT, Kind.ROWS), part=part, clock=lambda: self.now)
        self.shares.on_new = self._on_new
        self.access = Access(policy(signer, limits=[*limits]), shares=self.shares)

    def _on_new(self) -> None:
        self.new += 1

    def caller(self, tenant: str = "acme", **options: Any) -> bytes:
        return passed(claims_of(key(self.signer, tenant, **options)))[1].encode()

    def limits(self, tenant: str = "acme", model: str = "m", **options: Any) -> CallLimits:
        found = self.access.limits_of(self.caller(tenant, **options), model)
        assert found is not None
        return found


def refusal(limits: CallLimits, nbytes: int = 0, rows: int = 0) -> LimitReached:
    with pytest.raises(LimitReached) as raised:
        limits.reserve(nbytes, rows)
    return raised.value


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 5)),
        st.tuples(st.just("call"), st.integers(0, 3000), st.integers(0, 40)),
        st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(ENDS)),
    ),
    max_size=60,
)


def test_refused_calls_are_counted_by_limit_and_number(signer: Signer) -> None:
    world = World(signer, ALL)
    limits = world.limits()
    limits.reserve(3_000, 0).end()
    refusal(limits, nbytes=1)
    world.now += 10
    limits.reserve(0, 40).end()
    refusal(limits, rows=1)
    refusal(limits, rows=1)
    world.now += 10
    for _ in range(4):
        limits.reserve(0, 0)
    refusal(limits)
    counts = {labels: count for _, labels, count in world.shares.refused.read()}
    assert counts == {("all", "bytes"): 1, ("all", "rows"): 2, ("all", "in_flight"): 1}
    world.access.set_policy(policy(signer, limits=[{**ALL, "name": "other"}]))
    assert [*world.shares.refused.read()] == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_no_limit_is_exceeded_and_everything_is_free_when_all_calls_have_ended(
    signer: Signer, actions: list[Any]
) -> None:
    world = World(signer, ALL)
    limits = world.limits()
    in_flight: list[tuple[Reservation, int]] = []
    began, nbytes, rows = world.now, [0], [0]
    for action in actions:
        if action[0] == "wait":
            world.now += action[1]
        elif action[0] == "call":
            try:
                in_flight.append((limits.reserve(action[1], action[2]), action[2]))
            except LimitReached:
                continue
            assert len(in_flight) <= 4
            nbytes.append(action[1])
            rows.append(action[2])
        elif in_flight:
            reservation, asked = in_flight.pop(action[1] % len(in_flight))
            reservation.end(action[2])
            # The end is counted once, whatever comes after it.
            reservation.end(SHED)
            # Rows that did not run are given back.
            rows.append(-asked if action[2] in IS_SHED else 0)
        # One request may be larger than the burst: the next ones wait for it.
        for counted, rate, burst in ((nbytes, 1000, 2000), (rows, 10, 30)):
            most = burst + rate * (world.now - began) + max(max(counted) - burst, 0)
            assert sum(counted) <= most + 1e-6
    for reservation, _ in in_flight:
        reservation.end()
    world.now += 1000
    last = [limits.reserve(500, 7) for _ in range(4)]
    assert "4 requests in flight" in refusal(limits).message
    for each in last:
        each.end()
    limits.reserve(0, 2).end()
    assert "10 rows a second" in refusal(limits, rows=1).message
    assert "1000 bytes of requests a second" in refusal(limits, nbytes=1).message


def test_a_refusal_names_the_limit_and_counts_nothing(signer: Signer) -> None:
    world = World(signer, ALL, {"name": "few", "tenants": ["acme"], "rows_per_second": 5, "burst_rows": 5})
    limits = world.limits()
    limits.reserve(0, 5).end()
    error = refusal(limits, nbytes=2000, rows=1)
    assert error.retry_after_ms == 200
    assert error.message == (
        "limit 'few' of the policy: the tenant 'acme' has 5 rows a second: retry in 200 ms with fewer at a time, or "
        "ask the operator for a higher rows_per_second"
    )
    assert error.trailing == (
        ("x-ratelimit-limit", '5, 5;w=1;name="few/rows"'),
        ("x-ratelimit-remaining", "0"),
        ("x-ratelimit-reset", "1"),
    )
    # Of the refused request, nothing is left in the buckets before the one that refused it.
    limits.reserve(2000, 0).end()
    world.now += 0.2
    limits.reserve(0, 1).end()


def test_a_request_larger_than_the_burst_runs_when_the_bucket_is_full_and_counts_whole(signer: Signer) -> None:
    world = World(signer, {"name": "few", "rows_per_second": 10})
    limits = world.limits()
    limits.reserve(0, 64).end()
    assert refusal(limits, rows=1).retry_after_ms == 5_500
    world.now += 5.5
    limits.reserve(0, 1).end()


def test_tenants_keys_and_models_have_numbers_of_their_own(signer: Signer) -> None:
    world = World(
        signer,
        {"name": "tenant", "requests_in_flight": 2},
        {"name": "key", "per": "key", "tenants": ["acme"], "requests_in_flight": 1},
        {"name": "model", "per": "model", "models": ["small"], "requests_in_flight": 1},
    )
    one, two = world.caller("acme"), world.caller("acme")
    first = world.access.limits_of(one, "m")
    second = world.access.limits_of(two, "m")
    assert first is not None
    assert second is not None
    held = [first.reserve(0, 1)]
    assert "the key 'k-" in refusal(first).message
    held.append(second.reserve(0, 1))
    assert "the tenant 'acme' has 2 requests" in refusal(world.limits("acme")).message
    held.append(world.limits("globex", "small").reserve(0, 1))
    assert "the model 'small' has 1 requests" in refusal(world.limits("initech", "small")).message
    world.limits("globex").reserve(0, 1).end()
    for each in held:
        each.end()
    world.limits("acme").reserve(0, 1).end()


def test_a_job_counts_for_its_caller_in_flight_and_by_rows_only(signer: Signer) -> None:
    world = World(signer, ALL)
    assert world.access.limits_of(SERVICE, "m") is None
    jobs = world.access.limits_of(SERVICE, "m", world.access.storable(world.caller()))
    assert jobs is not None
    held = jobs.reserve(1_000_000, 30)
    assert "rows" in refusal(world.limits(), rows=1).message
    held.end()
    world.limits().reserve(2000, 0).end()


def test_a_caller_to_whom_no_limit_applies_is_not_counted(signer: Signer) -> None:
    world = World(signer, {"name": "acme", "tenants": ["acme"], "requests_in_flight": 1})
    assert world.access.is_limited
    assert world.access.limits_of(world.caller("globex"), "m") is None
    world.access.set_policy(policy(signer))
    assert not world.access.is_limited
    assert world.access.limits_of(world.caller("acme"), "m") is None


def test_what_is_in_flight_stays_counted_through_a_change_of_the_policy(signer: Signer) -> None:
    world = World(signer, {"name": "all", "requests_in_flight": 2})
    held = [world.limits().reserve(0, 1) for _ in range(2)]
    world.access.set_policy(policy(signer, limits=[{"name": "all", "requests_in_flight": 1}]))
    held.pop().end()
    refusal(world.limits())
    held.pop().end()
    world.limits().reserve(0, 1).end()


def test_processes_of_one_server_have_equal_parts(signer: Signer) -> None:
    world = World(signer, {"name": "all", "requests_in_flight": 4}, part=1 / 2)
    held = [world.limits().reserve(0, 1) for _ in range(2)]
    assert "(this instance has 2 of them now)" in refusal(world.limits()).message
    assert len(held) == 2


BUCKET = Bucket("all", Kind.ROWS, "acme")


@pytest.mark.parametrize("unrenewed", ["keep", "deny", "open"])
def test_granted_shares_are_held_as_long_as_they_count(signer: Signer, unrenewed: str) -> None:
    numbers = {"requests_in_flight": 80, "rows_per_second": 10}
    world = World(signer, {"name": "all", "unrenewed": unrenewed, **numbers}, part=None)
    world.limits()
    running, rows = (Bucket("all", kind, "acme") for kind in (Kind.IN_FLIGHT, Kind.ROWS))
    assert world.shares.held() == {}
    world.shares.grant({running: Amount(40), rows: Amount(2.5, 5)}, 10)
    assert world.shares.held() == {running: 40, rows: 2.5}
    world.now += 10
    assert bool(world.shares.held()) is (unrenewed == "keep")


def test_a_new_bucket_has_a_provisional_share_and_then_what_is_granted(signer: Signer) -> None:
    world = World(signer, {"name": "all", "rows_per_second": 80}, part=None)
    limits = world.limits()
    assert world.new == 1
    limits.reserve(0, 80 // PROVISIONAL_PARTS).end()
    assert refusal(limits, rows=1).retry_after_ms == 100
    # What the provisional share has used is not granted again.
    world.shares.grant({BUCKET: Amount(40, 40)}, 10)
    limits.reserve(0, 30).end()
    assert "(this instance has 40 of them now)" in refusal(limits, rows=1).message
    # A later grant fills no bucket.
    world.shares.grant({BUCKET: Amount(80, 80)}, 10)
    refusal(limits, rows=1)
    world.now += 1
    limits.reserve(0, 80).end()
    assert world.shares.demands() == {BUCKET: 10 + 1 + 30 + 1 + 1 + 80}
    # Without a share, nothing runs.
    world.shares.grant({BUCKET: Amount(0, 0)}, 10)
    world.now += 100
    refusal(limits, rows=1)


@pytest.mark.parametrize(("unrenewed", "runs"), [("keep", 20), ("deny", 0), ("open", 1_000_000)])
def test_a_share_that_nobody_renews_is_as_the_policy_says(signer: Signer, unrenewed: str, runs: int) -> None:
    limit = {"name": "all", "rows_per_second": 80, "unrenewed": unrenewed}
    world = World(signer, limit, part=None)
    limits = world.limits()
    world.shares.grant({BUCKET: Amount(20, 20)}, 10)
    world.now += 9
    world.shares.expire(10)
    limits.reserve(0, 20).end()
    world.now += 2
    world.shares.expire(10)
    world.now += 10
    if runs:
        limits.reserve(0, runs).end()
    if unrenewed != "open":
        refusal(limits, rows=1)
    world.shares.grant({BUCKET: Amount(20, 20)}, 10)
    world.now += 1_000_000
    limits.reserve(0, 20).end()
    refusal(limits, rows=1)


def test_a_limit_that_was_open_holds_again_with_its_first_share(signer: Signer) -> None:
    world = World(signer, {"name": "all", "rows_per_second": 80, "unrenewed": "open"}, part=None)
    limits = world.limits()
    world.shares.expire(10)
    world.now += 10
    world.shares.expire(10)
    limits.reserve(0, 1_000_000).end()
    # A claim for another bucket may succeed some milliseconds after the last renewal has failed.
    world.now += 0.05
    world.shares.grant({BUCKET: Amount(20, 20)}, 10)
    world.now += 1
    limits.reserve(0, 20).end()
    refusal(limits, rows=1)


def test_the_provisional_share_of_a_bucket_that_was_never_granted_ends_too(signer: Signer) -> None:
    world = World(signer, {"name": "all", "requests_in_flight": 80, "unrenewed": "deny"}, part=None)
    limits = world.limits()
    world.shares.expire(10)
    limits.reserve(0, 1).end()
    world.now += 10
    world.shares.expire(10)
    refusal(limits)


def test_the_demand_has_refused_calls_too(signer: Signer) -> None:
    world = World(signer, {"name": "all", "requests_in_flight": 80, "rows_per_second": 80}, part=None)
    limits = world.limits()
    held = [limits.reserve(0, 1) for _ in range(10)]
    for _ in range(5):
        refusal(limits, rows=1)
    held.pop().end()
    refusal(limits, rows=100)
    world.now += 2
    assert {bucket.kind: demand for bucket, demand in world.shares.demands().items()} == {
        Kind.IN_FLIGHT: 15,
        Kind.ROWS: 55,
    }
    assert {bucket.kind: demand for bucket, demand in world.shares.demands().items()} == {
        Kind.IN_FLIGHT: 9,
        Kind.ROWS: 0,
    }


def test_idle_buckets_are_forgotten_and_those_in_use_are_not(signer: Signer) -> None:
    world = World(signer, {"name": "all", "requests_in_flight": 8}, part=None)
    held = world.limits("acme").reserve(0, 1)
    world.limits("globex").reserve(0, 1).end()
    world.now += FORGOTTEN_AFTER_S + 1
    assert [bucket.tenant for bucket in world.shares.demands()] == ["acme"]
    # The provisional share of a forgotten bucket begins anew.
    world.limits("globex").reserve(0, 1).end()
    refusal(world.limits("acme"))
    held.end()
    world.limits("acme").reserve(0, 1).end()


def test_the_number_of_buckets_is_bounded_and_a_bystander_keeps_its_own(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKETS", 100)
    monkeypatch.setattr(module, "_FORGOTTEN_AT_ONCE", 10)
    world = World(signer, {"name": "all", "per": "model", "requests_in_flight": 8}, part=None)
    held = world.limits("globex", "mine").reserve(0, 1)
    for number in range(1_000):
        world.now += 0.001
        world.limits("acme", f"m{number}").reserve(0, 1).end()
        assert len(world.shares.demands()) <= 100
    refusal(world.limits("globex", "mine"))
    held.end()
    world.limits("globex", "mine").reserve(0, 1).end()


def test_a_bucket_that_is_not_full_again_is_not_forgotten_however_long_no_call_has_met_it(signer: Signer) -> None:
    world = World(signer, {"name": "all", "rows_per_second": 1, "burst_rows": 1000}, part=None)
    world.limits()
    world.shares.grant({BUCKET: Amount(1, 1000)}, 10)
    world.limits().reserve(0, 1000).end()
    world.now += FORGOTTEN_AFTER_S + 1
    world.shares.demands()
    refusal(world.limits(), rows=400)
    world.now += 1000
    assert world.shares.demands() == {}


def test_calls_of_many_unknown_models_do_not_fill_the_bucket_of_another(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKETS", 100)
    monkeypatch.setattr(module, "_FORGOTTEN_AT_ONCE", 10)
    world = World(signer, {"name": "all", "per": "model", "rows_per_second": 0.01, "burst_rows": 10})
    world.limits("globex", "mine").reserve(0, 10).end()
    for number in range(1_000):
        world.now += 0.001
        # Such a call is refused before it is counted.
        world.limits("acme", f"unknown-{number}")
        assert len(world.shares._shares) <= 100
    refusal(world.limits("globex", "mine"), rows=1)


@pytest.mark.parametrize("instances", [2, 8])
def test_a_share_of_less_than_one_unit_fills_until_a_call_passes(signer: Signer, instances: int) -> None:
    limit = {"name": "all", "per": "model", "requests_per_second": 1}
    worlds = [World(signer, limit, part=None) for _ in range(instances)]
    coord = Shares()
    coord.set_limits(policy(signer, limits=[limit]).limits)
    admitted = [0] * instances
    for second in range(100):
        for number, world in enumerate(worlds):
            for _ in range(4):
                world.now += 0.25
                with suppress(LimitReached):
                    world.limits().reserve(0, 1).end()
                    admitted[number] += 1
            world.shares.grant(coord.claim(str(number), world.shares.demands(), float(second)), 10)
    # Each has had a provisional unit.
    assert 90 <= sum(admitted) <= 100 + instances
    assert min(admitted) > 100 / instances / 2
