"""Division of limits among claimants: shares sum to the limit, newcomers get a part at once, unused parts flow back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coord.shares import LIFETIME_S, RENEW_S, STEP, Shares, divide
from shoal.access.limits import Bucket, Kind
from shoal.access.policy import Limit

DEMANDS = st.lists(st.one_of(st.floats(0, 1e9), st.just(math.inf)), min_size=1, max_size=20)
ACME = Bucket("l", Kind.REQUESTS, "acme")
RUNNING = Bucket("l", Kind.IN_FLIGHT, "acme")


def shares_of(rate: float = 100, in_flight: int | None = None) -> Shares:
    shares = Shares()
    shares.set_limits([Limit(name="l", requests_per_second=rate, requests_in_flight=in_flight)])
    return shares


def settle(shares: Shares, demands: dict[str, float], bucket: Bucket = ACME, now: float = 0.0) -> dict[str, float]:
    """Let every claimant claim until nothing changes, one after the other, and return the shares."""
    for _ in range(3):
        found = {name: shares.claim(name, {bucket: demand}, now)[bucket].amount for name, demand in demands.items()}
    return found


@given(st.floats(0.001, 1e9), DEMANDS)
def test_shares_sum_to_the_limit_and_are_fair(amount: float, demands: list[float]) -> None:
    shares = divide(amount, demands)
    assert sum(shares) == pytest.approx(amount)
    part = amount / len(demands)
    for share, demand in zip(shares, demands, strict=True):
        # Nobody lacks while it has less than an equal part, but for what idle claimants keep.
        assert share >= min(demand, part) * 0.9 * (1 - 1e-9)
        assert share >= part * 0.1 * (1 - 1e-9)
    if sum(demands) <= amount * 0.9:
        assert all(share >= demand * (1 - 1e-9) for share, demand in zip(shares, demands, strict=True))


@given(st.integers(1, 10_000), DEMANDS)
def test_whole_shares_are_whole_and_sum_to_the_limit(amount: int, demands: list[float]) -> None:
    shares = divide(amount, demands, is_whole=True)
    assert sum(shares) == amount
    assert all(share == int(share) >= 0 for share in shares)


def test_the_only_claimant_has_the_whole_limit() -> None:
    assert divide(100, [0.0]) == [100.0]
    assert divide(100, [math.inf]) == [100.0]
    assert divide(1, [3.0, 0.0], is_whole=True) == [1.0, 0.0]
    assert divide(100, []) == []


def test_a_newcomer_has_its_part_at_once_and_the_others_give_way_with_their_next_claim() -> None:
    shares = shares_of()
    assert shares.claim("a", {ACME: 100}, 0.0)[ACME].amount == 100
    assert shares.claim("b", {ACME: 0}, 0.1)[ACME].amount == 50
    assert shares.claim("a", {ACME: 100}, 1.0)[ACME].amount == 50


def test_an_unused_share_flows_to_those_who_lack() -> None:
    shares = shares_of()
    assert settle(shares, {"a": 500, "b": 500}) == {"a": 50, "b": 50}
    assert settle(shares, {"b": 0, "a": 500}) == {"a": 95, "b": 5}
    # An idle claimant that is released leaves everything.
    shares.claim("b", {}, 1.0)
    assert settle(shares, {"a": 500}) == {"a": 100}


def test_a_burst_is_shared_like_its_rate() -> None:
    shares = Shares()
    shares.set_limits([Limit(name="l", requests_per_second=10, burst_requests=40)])
    shares.claim("a", {ACME: 5}, 0.0)
    assert shares.claim("b", {ACME: 5}, 0.0)[ACME].burst == 20


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 300), st.floats(0, RENEW_S), st.booleans()), max_size=40)
)
def test_claimants_never_hold_more_than_twice_a_limit_and_not_above_it_when_all_have_claimed(
    claims: list[tuple[str, float, float, bool]],
) -> None:
    shares, held, now = shares_of(), dict[str, float](), 0.0
    for name, demand, pause, leaves in claims:
        now += pause
        held[name] = 0.0 if leaves else shares.claim(name, {ACME: demand}, now)[ACME].amount
        if leaves:
            shares.leave(name)
        assert sum(held.values()) <= 200 * (1 + 1e-9) + _expired(shares, held)
    alive = {name: 100.0 for name, share in held.items() if share}
    if alive:
        assert sum(settle(shares, alive, now=now).values()) <= 100 * (1 + 1e-9)


def _expired(shares: Shares, held: dict[str, float]) -> float:
    """Return what claimants hold whose shares have expired."""
    return sum(share for name, share in held.items() if name not in shares._claims)


def test_another_leader_hands_out_at_most_the_limit_again() -> None:
    """Before it, three instances hold the limit; each claims again within one interval."""
    former, successor = shares_of(), shares_of()
    names = ["a", "b", "c"]
    held = settle(former, dict.fromkeys(names, 100.0))
    most = 0.0
    for round_ in range(3):
        for name in names:
            held[name] = successor.claim(name, {ACME: 100}, round_ * RENEW_S)[ACME].amount
            most = max(most, sum(held.values()))
        if round_:
            assert sum(held.values()) <= 100 * (1 + 1e-9)
    assert 100 < most <= 200


@pytest.mark.parametrize("bucket", [ACME, RUNNING])
def test_under_another_leader_claimants_keep_what_they_have_until_all_have_claimed(bucket: Bucket) -> None:
    former, successor = shares_of(in_flight=100), shares_of(in_flight=100)
    held = settle(former, {"a": 100.0, "b": 30.0, "c": 0.0}, bucket)
    for round_ in range(3):
        for name in held:
            held[name] = successor.claim(name, {bucket: 100.0}, round_ * RENEW_S, {bucket: held[name]})[bucket].amount
            assert sum(held.values()) <= 100 * (1 + 1e-9)
            assert min(held.values()) > 0
    assert sum(held.values()) == pytest.approx(100)
    assert held["c"] == pytest.approx(100 / 3, abs=1)


@pytest.mark.parametrize("bucket", [ACME, RUNNING])
def test_another_leader_leaves_no_claimant_without_a_share(bucket: Bucket) -> None:
    successor = shares_of(100, in_flight=1000)
    held = [successor.claim(name, {bucket: 100.0}, 0.0)[bucket].amount for name in "abcdefgh"]
    assert min(held) > 0
    assert held == sorted(held, reverse=True)
    assert (
        sum(settle(successor, dict.fromkeys("abcdefgh", 100.0), bucket).values())
        <= (1000 if bucket is RUNNING else 100) + 1e-9
    )


def test_a_share_without_a_new_claim_expires() -> None:
    shares = shares_of()
    settle(shares, {"a": 100, "b": 100})
    assert shares.claim("a", {ACME: 100}, LIFETIME_S - 0.1)[ACME].amount == 50
    assert shares.claim("a", {ACME: 100}, LIFETIME_S)[ACME].amount == 100
    assert list(shares._claims) == ["a"]


def test_what_nobody_claims_is_forgotten() -> None:
    shares = shares_of()
    buckets: Iterable[Bucket] = [Bucket("l", Kind.REQUESTS, f"t{number}") for number in range(50)]
    shares.claim("a", dict.fromkeys(buckets, 1.0), 0.0)
    shares.claim("a", {ACME: 1.0}, 0.0)
    assert list(shares._holdings) == [ACME]
    shares.leave("a")
    assert not shares._holdings


def test_a_changed_limit_holds_from_the_next_claim_on() -> None:
    shares = shares_of(rate=100)
    settle(shares, {"a": 100, "b": 100})
    shares.set_limits([Limit(name="l", requests_per_second=10)])
    assert settle(shares, {"a": 100, "b": 100}) == {"a": 5, "b": 5}
    shares.set_limits([])
    assert shares.claim("a", {ACME: 100}, 0.0) == {}


def test_a_number_in_flight_is_shared_in_whole_requests() -> None:
    shares = shares_of(in_flight=3)
    found = settle(shares, {"a": 5, "b": 5}, RUNNING)
    assert sorted(found.values()) == [1, 2]
    one = shares_of(in_flight=1)
    assert settle(one, {"a": 0, "b": 4}, RUNNING) == {"a": 0, "b": 1}


def test_a_claim_that_a_later_one_overtakes_leaves_no_share_behind() -> None:
    shares = shares_of(100)
    many = {Bucket("l", Kind.REQUESTS, f"tenant-{number}"): 1.0 for number in range(STEP)}
    overtaken = shares.claim_in_steps("one", {**many, ACME: 1.0}, 0.0, {})
    next(overtaken)
    shares.claim("one", many, 0.0)
    assert list(overtaken) == []
    shares.claim("two", {ACME: 50.0}, 0.0)
    assert shares.claim("two", {ACME: 50.0}, 1.0)[ACME].amount == 100.0
