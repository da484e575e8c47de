"""Quotas: configured buckets, what an Envoy is told, when it forgets a bucket, and the messages as Envoy has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from envoy_data_plane.envoy.service.rate_limit_quota.v3 import (
    BucketId,
    RateLimitQuotaResponse,
    RateLimitQuotaUsageReports,
    RateLimitQuotaUsageReportsBucketQuotaUsage,
)
from envoy_data_plane.envoy.type.v3 import RateLimitStrategyBlanketRule

from mesh.metrics.limits import REFUSED, RefusedCounts
from mesh.xds import limits, quota
from mesh.xds.quota import IDLE_S, QuotaServer, _Gateway
from mesh.xds.quota_messages import Reports
from shoal.access import tokens
from shoal.access.limits import Amount, Bucket, Kind
from shoal.access.policy import Limit
from tests.access.policies import policy

ACME = Bucket("l", Kind.REQUESTS, "acme", "k1")
IDS = {"limit": "l", "tenant": "acme", "key": "k1"}


def reports(*usages: tuple[Mapping[str, str], int, int]) -> Any:
    """Return the usages of a report that Envoy sends."""
    sent = RateLimitQuotaUsageReports(
        domain="shoal",
        bucket_quota_usages=[
            RateLimitQuotaUsageReportsBucketQuotaUsage(
                bucket_id=BucketId(bucket=dict(ids)),
                time_elapsed=timedelta(seconds=5),
                num_requests_allowed=allowed,
                num_requests_denied=denied,
            )
            for ids, allowed, denied in usages
        ],
    )
    return Reports.FromString(bytes(sent)).bucket_quota_usages


def told(gateway: _Gateway, share: Amount | None, limit: Limit | None, now: float) -> list[Any]:
    """Return the actions of a response, as Envoy reads them."""
    shares = {} if share is None else {ACME: share}
    response = gateway.actions(shares, lambda name: limit, now)
    return [] if response is None else RateLimitQuotaResponse.parse(response.SerializeToString()).bucket_action


def limit(**fields: Any) -> Limit:
    return Limit(name="l", requests_per_second=10, **fields)


def test_envoy_reads_what_coord_writes() -> None:
    gateway = _Gateway(RefusedCounts())
    assert gateway.report(reports((IDS, 1, 0)), 0.0)
    (action,) = told(gateway, Amount(2.5, 4.0), limit(), 0.0)
    assert action.bucket_id.bucket == IDS
    assignment = action.quota_assignment_action
    assert assignment.assignment_time_to_live > timedelta(days=3_000)
    bucket = assignment.rate_limit_strategy.token_bucket
    assert (bucket.max_tokens, bucket.tokens_per_fill, bucket.fill_interval) == (4, 2500, timedelta(seconds=1000))


def test_buckets_with_fixed_ids_are_bounded_however_many_subjects_limits_distinguish() -> None:
    subjects, tenants = [f"s-{n}" for n in range(250)], [f"t-{n:03}" for n in range(200)]
    grants = [{"name": "named", "tenants": tenants, "models": ["*"]}]
    of_all = {"name": "all", "requests_per_second": 1}
    of_subjects = {"name": "some", "subjects": subjects, "requests_per_second": 2}
    counts = []
    for limited in ([of_all], [of_all, of_subjects]):
        made = limits.quotas(policy(tokens.new_signer(), limits=limited, grants=grants), "coord")
        counts.append(json.dumps(made).count('"bucket_id_builder": {"bucket_id_builder"'))
    # In each case, of 1 and of 251, one more bucket is for the other tenants.
    assert counts == [128 + 1, 251 * (2 + 1)]


def test_a_demand_counts_refused_calls_over_the_time_between_reports() -> None:
    refused = RefusedCounts()
    gateway = _Gateway(refused)
    gateway.report(reports((IDS, 1, 0)), 0.0)
    assert gateway.demands()[ACME] == float("inf")
    # Envoy may report again at once.
    assert not gateway.report(reports((IDS, 5, 0)), 0.2)
    assert gateway.demands()[ACME] == float("inf")
    gateway.report(reports((IDS, 10, 25)), 5.0)
    assert gateway.demands()[ACME] == 8.0
    assert [*refused.read()] == [(REFUSED, ("l", "requests"), 25)]


async def test_refused_calls_of_a_limit_that_the_policy_does_not_have_any_more_are_forgotten() -> None:
    class OneLimit:
        renew_s = 1.0
        found: Limit | None = limit()

        async def claim(
            self, claimant: str, demands: Mapping[Bucket, float], held: Mapping[Bucket, float]
        ) -> Mapping[Bucket, Amount]:
            return {}

        def limit(self, name: str) -> Limit | None:
            return self.found

    claims: Any = OneLimit()
    server = QuotaServer(claims, "local/coord-0", lambda: 0.0)
    gateway = _Gateway(server.refused)
    gateway.report(reports((IDS, 0, 3)), 0.0)
    await server._renewed("local/coord-0/gateway-0", gateway)
    assert [*server.refused.read()] == [(REFUSED, ("l", "requests"), 3)]
    claims.found = None
    await server._renewed("local/coord-0/gateway-0", gateway)
    assert [*server.refused.read()] == []


def test_only_a_changed_share_is_sent_unless_it_expires() -> None:
    kept, strict = _Gateway(RefusedCounts()), _Gateway(RefusedCounts())
    for gateway, unrenewed in ((kept, "keep"), (strict, "deny")):
        gateway.report(reports((IDS, 1, 0)), 0.0)
        assert len(told(gateway, Amount(5, 5), limit(unrenewed=unrenewed), 0.0)) == 1
        assert told(gateway, Amount(5, 5), limit(unrenewed=unrenewed), 1.0) == []
        assert len(told(gateway, Amount(4, 5), limit(unrenewed=unrenewed), 1.0)) == 1
        assert gateway.held() == {ACME: 4}
    assert told(kept, Amount(4, 5), limit(), 20.0) == []
    (renewed,) = told(strict, Amount(4, 5), limit(unrenewed="deny"), 6.0)
    assert renewed.quota_assignment_action.assignment_time_to_live == timedelta(seconds=15)


def test_without_a_share_every_call_is_denied() -> None:
    gateway = _Gateway(RefusedCounts())
    gateway.report(reports((IDS, 1, 0)), 0.0)
    (action,) = told(gateway, Amount(0, 0), limit(), 0.0)
    strategy = action.quota_assignment_action.rate_limit_strategy
    assert strategy.blanket_rule == RateLimitStrategyBlanketRule.DENY_ALL
    assert strategy.token_bucket is None


@pytest.mark.parametrize(("now", "of_policy"), [(IDLE_S, True), (1.0, False)])
def test_envoy_forgets_idle_buckets_and_those_of_removed_limits(now: float, of_policy: bool) -> None:
    gateway = _Gateway(RefusedCounts())
    gateway.report(reports((IDS, 1, 0)), 0.0)
    told(gateway, Amount(5, 5), limit(), 0.0)
    gateway.report(reports((IDS, 0, 0)), 0.9)
    (action,) = told(gateway, Amount(5, 5), limit() if of_policy else None, now)
    assert action.abandon_action is not None
    assert gateway.demands() == {}


def test_envoy_keeps_an_idle_bucket_until_it_is_full_again() -> None:
    gateway = _Gateway(RefusedCounts())
    slow = Limit(name="l", requests_per_second=1, burst_requests=1000)
    gateway.report(reports((IDS, 1000, 0)), 0.0)
    told(gateway, Amount(1, 1000), slow, 0.0)
    assert told(gateway, Amount(1, 1000), slow, IDLE_S) == []
    (action,) = told(gateway, Amount(1, 1000), slow, 1000.0)
    assert action.abandon_action is not None


def test_buckets_beyond_the_bound_are_forgotten_the_latest_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "BUCKETS", 2)
    gateway = _Gateway(RefusedCounts())
    names = ["a", "b", "c", "d"]
    for at, name in enumerate(names):
        gateway.report(reports(({**IDS, "tenant": name}, 1, 0)), float(at))
    demands = gateway.demands()
    assert {bucket.tenant for bucket in demands} == {"c", "d"}
    response = gateway.actions(dict.fromkeys(demands, Amount(5, 5)), lambda name: limit(), 4.0)
    forgotten = [a.bucket_id.bucket[1].value for a in response.bucket_action if a.HasField("abandon_action")]
    assert sorted(forgotten) == ["a", "b"]
    assert gateway.demands().keys() == demands.keys()


@pytest.mark.parametrize("ids", [{}, {"tenant": "a"}, {"limit": "l", "else": "x"}, {"limit": "l", "tenant": "x" * 600}])
def test_buckets_that_shoal_has_not_made_are_ignored(ids: dict[str, str]) -> None:
    gateway = _Gateway(RefusedCounts())
    assert not gateway.report(reports((ids, 1, 0)), 0.0)
