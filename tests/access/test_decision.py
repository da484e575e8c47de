"""The decision: properties that hold for every policy, caller and call."""

from __future__ import annotations

import fnmatch
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.access import tokens
from shoal.access.decision import Caller, caller_of, decide
from shoal.access.gateway import groups_of_role
from shoal.access.patterns import matches
from shoal.access.policy import BUILTIN_ROLES, Claims, Grant, Issuer, Policy
from shoal.access.rpc_groups import (
    CODE,
    GRANTABLE,
    GROUP_OF,
    HEALTH,
    INFERS_LATER,
    INTERNAL,
    LOAD,
    LOAD_WITH_CODE,
    MODEL_INFER,
)
from shoal.errors import Unauthenticated

TENANTS, ROLES, SUBJECTS = ("acme", "globex"), ("viewer", "user", "publisher", "admin", "other"), ("ann", "bob")
MODELS = ("ocr", "ocr-en", "secret", "det.v2")
RPCS = sorted(GROUP_OF)

patterns = st.sampled_from(["*", "ocr", "ocr*", "*e*", "secret", "*.v2", "x"])
groups = st.lists(st.sampled_from([*GRANTABLE, "*"]), max_size=3).map(tuple)


def names(of: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.one_of(st.just(("*",)), st.lists(st.sampled_from(of), min_size=1, max_size=2).map(tuple))


def grants(deny: bool | None = None) -> st.SearchStrategy[Grant]:
    """Grants that allow or deny; `deny` limits them to one of the two."""
    allowing = st.builds(
        Grant.model_construct,
        name=st.sampled_from(["a", "b"]),
        tenants=names(TENANTS),
        roles=names(ROLES),
        subjects=names(SUBJECTS),
        by_name=st.booleans(),
        allow=st.one_of(st.none(), groups),
        deny=st.none(),
        models=st.lists(patterns, min_size=1, max_size=2).map(tuple),
    )
    denying = st.builds(
        lambda grant, refused: grant.model_copy(update={"allow": None, "deny": refused or ("*",)}), allowing, groups
    )
    return {None: st.one_of(allowing, denying), False: allowing, True: denying}[deny]


@st.composite
def policies(draw: st.DrawFn, deny: bool | None = None) -> Policy:
    return Policy.model_construct(
        version=1,
        issuers=(),
        roles=draw(st.sampled_from([{}, {"other": ("infer",)}, {"user": ()}])),
        grants=tuple(draw(st.lists(grants(deny), max_size=4))),
        hosts=("*",),
        open=draw(st.sampled_from([(), (HEALTH,)])),
        revoked=draw(st.sampled_from([(), ("k-1",)])),
    )


callers = st.one_of(
    st.none(),
    st.builds(
        Caller,
        issuer=st.just("shoal"),
        tenant=st.sampled_from(TENANTS),
        subject=st.sampled_from(SUBJECTS),
        role=st.sampled_from([*ROLES, ""]),
        key=st.sampled_from(["", "k-1", "k-2"]),
        grants=st.frozensets(st.sampled_from(["a", "b"])),
        models=st.lists(patterns, max_size=2).map(tuple),
    ),
)
rpcs = st.sampled_from(RPCS)
models = st.one_of(st.none(), st.sampled_from(MODELS))


few = settings(max_examples=40)


def with_grants(policy: Policy, *more: Grant) -> Policy:
    return policy.model_copy(update={"grants": (*policy.grants, *more)})


@few
@given(policies(), callers, rpcs, models, grants(deny=False))
def test_a_further_allowing_grant_takes_nothing_away(policy, caller, rpc, model, grant) -> None:
    if decide(policy, caller, rpc, model).allowed:
        assert decide(with_grants(policy, grant), caller, rpc, model).allowed


@few
@given(policies(), callers, rpcs, models, grants(deny=True))
def test_a_further_denying_grant_gives_nothing(policy, caller, rpc, model, grant) -> None:
    if not decide(policy, caller, rpc, model).allowed:
        assert not decide(with_grants(policy, grant), caller, rpc, model).allowed


@few
@given(policies(deny=False), callers, rpcs, models, groups, st.randoms())
def test_a_denial_wins_wherever_it_stands(policy, caller, rpc, model, refused, random) -> None:
    deny = Grant(name="no", deny=("*",), models=("*",))
    order = [*policy.grants, deny]
    random.shuffle(order)
    decision = decide(policy.model_copy(update={"grants": tuple(order)}), caller, rpc, model)
    assert not decision.allowed or GROUP_OF[rpc] in policy.open


@given(callers, rpcs, models)
def test_without_a_grant_nothing_is_allowed(caller, rpc, model) -> None:
    empty = Policy.model_construct(version=1, issuers=(), roles={}, grants=(), hosts=("*",), open=(), revoked=())
    assert not decide(empty, caller, rpc, model).allowed


@few
@given(policies(), callers, models)
def test_internal_and_unknown_rpcs_are_never_allowed(policy, caller, model) -> None:
    for rpc in [*(rpc for rpc, group in GROUP_OF.items() if group == INTERNAL), "/x.Y/Z", "", MODEL_INFER + "?a=1"]:
        assert not decide(policy, caller, rpc, model).allowed


@few
@given(policies(), callers, rpcs, st.sampled_from(MODELS))
def test_what_is_allowed_for_a_model_is_allowed_before_the_model_is_known(policy, caller, rpc, model) -> None:
    if decide(policy, caller, rpc, model).allowed:
        assert decide(policy, caller, rpc, None).allowed


@few
@given(policies(), callers, rpcs, models)
def test_a_gateway_lets_pass_whatever_may_be_allowed(policy, caller, rpc, model) -> None:
    if caller is not None and decide(policy, caller, rpc, model).allowed and GROUP_OF[rpc] not in policy.open:
        assert GROUP_OF[rpc] in groups_of_role(policy, caller.role)


@few
@given(policies(), callers, rpcs, models)
def test_a_revoked_key_is_refused(policy, caller, rpc, model) -> None:
    if caller is not None and caller.key and GROUP_OF[rpc] not in policy.open:
        revoked = policy.model_copy(update={"revoked": (caller.key,)})
        assert not decide(revoked, caller, rpc, model).allowed


@given(st.text("ab*", max_size=8), st.text("ab", max_size=12))
def test_patterns_match_as_fnmatch_does(pattern: str, name: str) -> None:
    assert matches(pattern, name) == fnmatch.fnmatchcase(name, pattern)


def test_a_pattern_with_many_stars_takes_no_time() -> None:
    begun = time.process_time()
    assert not matches("*a" * 120 + "*b", "a" * 255)
    assert time.process_time() - begun < 5


def test_no_role_may_load_code() -> None:
    caller = Caller("shoal", "acme", role="publisher")
    roles = Policy.model_construct(
        version=1, issuers=(), roles={}, grants=(Grant(name="roles", models=("*",)),), hosts=("*",), open=(), revoked=()
    )
    assert decide(roles, caller, LOAD, "m").allowed
    assert not decide(roles, caller, LOAD_WITH_CODE, "m").allowed
    assert not [role for role, allowed in BUILTIN_ROLES.items() if CODE in allowed]
    code = with_grants(roles, Grant(name="code", roles=("publisher",), allow=("code",), models=("m",)))
    assert decide(code, caller, LOAD_WITH_CODE, "m").allowed
    assert not decide(code, caller, LOAD_WITH_CODE, "n").allowed


def foreign(**changes: object) -> Policy:
    made = Issuer.model_construct(**{"issuer": "idp", "audiences": ("a",), "claims": None, **changes})
    return Policy.model_construct(version=1, issuers=(made,), roles={}, grants=(), revoked=())


def test_claims_become_a_caller() -> None:
    claims = {
        "iss": "idp",
        "org": {"id": "acme"},
        "sub": "ann",
        "role": "user",
        "jti": "t1",
        "m": ["a*", 7],
        "exp": 100,
    }
    policy = foreign(claims=Claims(tenant="org.id", models="m"))
    expected = Caller("idp", "acme", "ann", "user", "t1", frozenset(), ("a*",), 130.0)
    assert caller_of(policy, claims) == expected
    assert caller_of(policy, {**claims, "m": "a*"}) == expected
    del claims["m"]
    assert caller_of(policy, claims).models == ()
    assert caller_of(policy, {**claims, "role": ["admin"]}).role == ""


@pytest.mark.parametrize("tenant", [None, "", ["acme"], "a\nb", "acme\n", 7, "x" * 65])
def test_a_token_without_a_name_of_a_tenant_is_refused(tenant: object) -> None:
    with pytest.raises(Unauthenticated, match="no name of a tenant"):
        caller_of(foreign(), {"iss": "idp", "tenant": tenant})
    assert caller_of(foreign(), {"iss": "idp", "tenant": "x" * 64}).tenant == "x" * 64


@pytest.mark.parametrize(
    "id", ["", " ", "k 1", " k-1", "k-1\n", "k\t", "schlüssel", "k" * 256, 7, ["k-1"], {"k": 1}, True]
)
def test_a_token_with_an_id_that_cannot_be_revoked_is_refused(id: object) -> None:
    claims = {"iss": "idp", "tenant": "acme"}
    assert caller_of(foreign(), {**claims, "jti": "k" * 255}).key == "k" * 255
    assert caller_of(foreign(), claims).key == ""
    with pytest.raises(Unauthenticated, match="an id in its claim 'jti' that cannot be revoked"):
        caller_of(foreign(), {**claims, "jti": id})


def test_a_claim_with_a_dot_in_its_name_is_refused_and_not_ignored() -> None:
    policy = foreign(tenant=None, claims=Claims(tenant="org.id", role="acme.role"))
    assert caller_of(policy, {"iss": "idp", "org": {"id": "acme"}, "acme": {"role": "user"}}).role == "user"
    assert caller_of(policy, {"iss": "idp", "org": {"id": "acme"}}).role == ""
    with pytest.raises(Unauthenticated, match=r"a claim with a dot in its name, 'acme\.role'"):
        caller_of(policy, {"iss": "idp", "org": {"id": "acme"}, "acme.role": "user"})


def test_a_fixed_tenant_and_role_override_the_claims() -> None:
    caller = caller_of(foreign(tenant="acme", role="viewer"), {"iss": "idp", "tenant": "globex", "role": "admin"})
    assert (caller.tenant, caller.role) == ("acme", "viewer")


def test_a_token_of_another_issuer_is_refused() -> None:
    with pytest.raises(Unauthenticated, match="no such issuer"):
        caller_of(foreign(), {"iss": "other", "tenant": "acme"})
    assert tokens.ISSUER == "shoal"


@pytest.mark.parametrize("rpc", sorted(INFERS_LATER))
@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        ({"deny": ("infer",)}, "grant 'no' denies infer of the model 'secret'"),
        ({"deny": ("jobs",)}, "grant 'no' denies jobs of the model 'secret'"),
    ],
)
def test_a_call_that_has_a_model_run_later_is_decided_as_an_inference_too(rpc: str, more: dict, refusal: str) -> None:
    user = Caller("shoal", "acme", role="user")
    grants = (Grant(name="roles", models=("*",)), Grant(name="no", models=("sec*",), **more))
    policy = Policy.model_construct(version=1, issuers=(), roles={}, grants=grants, hosts=("*",), open=(), revoked=())
    refused, allowed = decide(policy, user, rpc, "secret"), decide(policy, user, rpc, "ocr")
    assert (refused.allowed, refused.rule) == (False, refusal)
    assert allowed.allowed
    assert allowed.rule == "grant 'roles' allows jobs of the model 'ocr'; grant 'roles' allows infer of the model 'ocr'"
    # Some model may be allowed, unless no inference is.
    assert decide(policy, user, rpc).allowed
    jobs_only = policy.model_copy(update={"roles": {"user": ("jobs",)}})
    assert decide(jobs_only, user, rpc).rule == "no grant allows infer to the role 'user' of 'acme'"
