"""Limits of a policy: those that apply to a caller, and the buckets in which its calls count."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.access import limits, policy
from shoal.access.decision import Caller
from shoal.access.limits import Amount, Bucket, Case, Kind, Split, amount_of, applicable
from shoal.access.policy import Policy
from shoal.errors import InvalidArgument

ISSUER = {"issuer": "shoal", "audiences": ["shoal"], "token_prefix": "shoal_", "cluster": True}


def with_limits(*entries: dict[str, Any]) -> Policy:
    return policy.parse(json.dumps({"version": 1, "issuers": [ISSUER], "limits": list(entries)}))


def caller(tenant: str = "acme", role: str = "user", subject: str = "ann", key: str = "k1") -> Caller:
    return Caller("shoal", tenant, subject, role, key)


def names(found: Policy, who: Caller | None) -> list[str]:
    return [limit.name for limit in applicable(found, who)]


def test_a_limit_holds_for_callers_in_all_of_its_lists() -> None:
    found = with_limits(
        {"name": "all", "requests_per_second": 1},
        {"name": "acme", "tenants": ["acme"], "roles": ["user"], "subjects": ["ann"], "rows_per_second": 1},
        {"name": "others", "except_tenants": ["acme"], "bytes_per_second": 1},
    )
    assert names(found, caller()) == ["all", "acme"]
    assert names(found, caller(role="viewer")) == ["all"]
    assert names(found, caller(subject="bob")) == ["all"]
    assert names(found, caller(tenant="globex")) == ["all", "others"]
    assert names(found, None) == []


def test_each_unit_has_a_bucket_of_its_own() -> None:
    per = ("tenant", "key", "model")
    found = with_limits(*({"name": f"by-{unit}", "per": unit, "requests_in_flight": 2} for unit in per))
    counted = [limits.bucket_of(limit, Kind.IN_FLIGHT, caller(), "ocr") for limit in applicable(found, caller())]
    assert counted == [
        Bucket("by-tenant", Kind.IN_FLIGHT, tenant="acme"),
        Bucket("by-key", Kind.IN_FLIGHT, tenant="acme", key="k1"),
        Bucket("by-model", Kind.IN_FLIGHT, model="ocr"),
    ]


def test_only_calls_of_the_limits_models_count() -> None:
    found = with_limits({"name": "large", "models": ["llm*", "*-xl"], "rows_per_second": 5})
    [large] = found.limits
    assert [limits.counts_model(large, model) for model in ("ocr", "ocr-xl", "llm-7")] == [False, True, True]


def test_requests_are_counted_at_the_gateway_unless_the_model_decides() -> None:
    found = with_limits(
        {"name": "plain", "requests_per_second": 1, "rows_per_second": 2},
        {"name": "of-models", "models": ["ocr*"], "requests_per_second": 1},
        {"name": "by-model", "per": "model", "requests_per_second": 1},
    )
    plain, of_models, by_model = found.limits
    assert [limits.at_gateway(limit) for limit in found.limits] == [True, False, False]
    assert limits.in_services(plain) == (Kind.ROWS,)
    assert limits.in_services(of_models) == limits.in_services(by_model) == (Kind.REQUESTS,)


def test_a_burst_is_that_of_one_second_unless_it_is_given() -> None:
    (limit,) = with_limits(
        {"name": "a", "requests_per_second": 0.5, "bytes_per_second": 1000, "rows_per_second": 7, "burst_rows": 3}
    ).limits
    assert amount_of(limit, Kind.REQUESTS) == Amount(0.5, 1.0)
    assert amount_of(limit, Kind.BYTES) == Amount(1000.0, 1000.0)
    assert amount_of(limit, Kind.ROWS) == Amount(7.0, 3.0)
    assert amount_of(limit, Kind.IN_FLIGHT) is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "a limit needs a number"),
        ({"requests_per_second": 1, "burst_rows": 1}, "burst_rows is only with rows_per_second"),
        ({"requests_per_second": 0}, "requests_per_second"),
        ({"requests_per_second": float("inf")}, "requests_per_second"),
        ({"requests_in_flight": 1, "roles": ["nobody"]}, "limit 'a': no role 'nobody'"),
        ({"requests_in_flight": 1, "per": "call"}, "per"),
    ],
)
def test_an_invalid_limit_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        with_limits({"name": "a", **entry})


def test_the_number_of_limits_is_bounded_and_names_are_distinct() -> None:
    entries = [{"name": f"l{number}", "requests_in_flight": 1} for number in range(policy.LIMITS + 1)]
    with_limits(*entries[:-1])
    with pytest.raises(InvalidArgument, match="at most 100 items"):
        with_limits(*entries)
    with pytest.raises(InvalidArgument, match="the limit 'l0' occurs twice"):
        with_limits(entries[0], {**entries[0]})


# -- requests at the gateway

TENANTS, ROLES, SUBJECTS = ["acme", "globex"], ["user", "viewer"], ["ann", "bob"]


def some(names: list[str]) -> st.SearchStrategy[list[str]]:
    return st.one_of(st.just(["*"]), st.lists(st.sampled_from(names), min_size=1, unique=True))


LIMITS = st.lists(
    st.fixed_dictionaries(
        {
            "tenants": some(TENANTS),
            "except_tenants": st.lists(st.sampled_from(TENANTS), unique=True),
            "roles": some(ROLES),
            "subjects": some(SUBJECTS),
        }
    ),
    max_size=6,
)


def decided(case: Case, who: Caller) -> str | None:
    """Return the name of the limit that a case decides on for a caller."""
    while isinstance(case, Split):
        case = case.entries.get(getattr(who, case.field), case.otherwise)
    return None if case is None else case.name


@given(LIMITS)
def test_the_layers_of_a_gateway_hold_every_limit_that_applies(entries: list[dict[str, Any]]) -> None:
    found = tuple(
        policy.Limit(name=f"l{number}", requests_per_second=1, **entry) for number, entry in enumerate(entries)
    )
    layers = limits.layers(found)
    assert sorted(limit.name for layer in layers for limit in layer) == sorted(limit.name for limit in found)
    for tenant, role, subject in product([*TENANTS, "x"], [*ROLES, "x"], [*SUBJECTS, "x"]):
        who = caller(tenant, role, subject)
        applying = {limit.name for limit in found if limits.applies(limit, tenant=tenant, role=role, subject=subject)}
        at_gateway = [decided(limits.case_of(layer), who) for layer in layers]
        assert {name for name in at_gateway if name is not None} == applying
        with_constants = [decided(limits.case_of(layer, tenant=tenant, role=role), who) for layer in layers]
        assert with_constants == at_gateway


def test_a_policy_with_too_many_limits_of_one_caller_is_refused() -> None:
    entries = [{"name": f"l{number}", "requests_per_second": 1} for number in range(limits.LAYERS + 1)]
    limits.check(with_limits(*entries[:-1]).limits)
    with pytest.raises(InvalidArgument, match="more than 4 limits of requests a second may hold for one caller, such"):
        limits.check(with_limits(*entries).limits)
    plans = [{**entries[0], "name": f"plan-{number}", "tenants": [f"t{number}"]} for number in range(100)]
    assert len(limits.layers(with_limits(*plans).limits)) == 1


def test_lists_that_make_too_many_cases_are_refused_before_they_are_made() -> None:
    many = [f"n{number}" for number in range(600)]
    one = {"requests_per_second": 1}
    both = {"name": "a", "tenants": many, "subjects": many}
    with pytest.raises(InvalidArgument, match="make up to 361201 cases"):
        limits.check(with_limits({**both, **one}).limits)
    entries = [{"name": f"l{at}", "tenants": [f"{at}-{name}" for name in many], **one} for at in range(4)]
    with pytest.raises(InvalidArgument, match="list 2400 names"):
        limits.check(with_limits(*entries).limits)
    limits.check(with_limits({**both, "rows_per_second": 1}).limits)
