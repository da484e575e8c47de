"""Which rule counts for whom: plain functions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.retention.messages import message_of, rule_of
from services.store.retention.rules import LONGEST, SHORTEST, DataKind, Rule, check_rule, plan
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as pb

NOW = datetime(2026, 11, 24, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)

ages = st.none() | st.timedeltas(timedelta(minutes=1), timedelta(days=900))
rules = st.builds(Rule, st.sampled_from(DataKind), st.none() | st.sampled_from(["", "a", "b"]), ages)


@given(
    st.lists(rules, unique_by=lambda rule: rule.id), st.sampled_from(DataKind), st.sampled_from(["", "a", "b", "other"])
)
def test_a_tenants_own_rule_counts_before_that_for_everybody(rules: list[Rule], kind: DataKind, tenant: str) -> None:
    mine = [rule for rule in rules if rule.kind is kind and rule.tenant == tenant]
    all_ = [rule for rule in rules if rule.kind is kind and rule.tenant is None]
    (counts,) = mine or all_ or [Rule(kind, None, None)]
    made = plan(rules, kind, NOW)
    assert made.until(tenant) == (NOW - counts.keep_for if counts.keep_for is not None else None)
    if made.is_empty:
        assert all(made.until(one) is None for one in ("", "a", "b", "other"))
    if made.is_one_for_all:
        assert len({made.until(one) for one in ("", "a", "b", "other")}) == 1


def test_every_rule_has_an_id_of_its_own() -> None:
    made = [Rule(kind, tenant, HOUR) for kind in DataKind for tenant in (None, "", "a", "a/b", "results")]
    assert len({rule.id for rule in made}) == len(made)


@pytest.mark.parametrize("kind", DataKind)
def test_the_bounds_of_a_rule(kind: DataKind) -> None:
    for keep in (SHORTEST[kind], LONGEST, None):
        check_rule(Rule(kind, None, keep))
    for wrong in (SHORTEST[kind] - timedelta(milliseconds=1), LONGEST + timedelta(seconds=1), timedelta(0), -DAY):
        with pytest.raises(InvalidArgument, match=r"rule\.keep"):
            check_rule(Rule(kind, None, wrong))


def test_tombstones_have_no_tenant() -> None:
    with pytest.raises(InvalidArgument, match="tombstones have no tenant"):
        check_rule(Rule(DataKind.TOMBSTONES, "a", DAY))
    with pytest.raises(InvalidArgument, match=r"rule\.tenant"):
        check_rule(Rule(DataKind.RESULTS, "a" * 1_025, DAY))


@given(rules)
def test_a_rule_is_its_message(rule: Rule) -> None:
    assert rule_of(message_of(rule)) == rule


@pytest.mark.parametrize(
    "message",
    [
        pb.RetentionRule(),
        pb.RetentionRule(collection=9),
        pb.RetentionRule(collection=-1),
        pb.RetentionRule(collection=1, keep={"seconds": 1 << 62}),
        pb.RetentionRule(collection=1, keep={"nanos": 2_000_000_000}),
    ],
    ids=str,
)
def test_hostile_messages(message: pb.RetentionRule) -> None:
    with pytest.raises(InvalidArgument, match="rule"):
        rule_of(message)
