"""Envoy's part of a policy: the order of filters, and what each file holds. The attacks are in tests/node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh.xds import access
from shoal.access import tokens
from shoal.access.tokens import Signer
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node import envoy_access, exposure
from shoal.node.envoy_edge import bootstrap
from shoal.node.front import choose
from tests.access.policies import issuer, policy

WEB = ["envoy.filters.http.cors", "envoy.filters.http.grpc_web"]
SERVICES = ("inference.GRPCInferenceService", "grpc.health.v1.Health")
SHARED = {"routes": [], "request_headers_to_remove": ["x-forwarded-proto"]}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


def manager(folder: Path | None) -> dict[str, Any]:
    made = bootstrap(host="0.0.0.0", port=1, workers=["/w.sock"], admin="/a.sock", policy_folder=folder)
    chain = made["static_resources"]["listeners"][0]["filter_chains"][0]
    found: dict[str, Any] = chain["filters"][-1]["typed_config"]
    return found


def test_callers_are_verified_before_rules_and_rules_before_the_router(tmp_path: Path) -> None:
    made = manager(tmp_path)
    names = [one["name"] for one in made["http_filters"]]
    assert names == [*WEB, "shoal.callers", "shoal.rules", "envoy.filters.http.router"]
    mutations = made["early_header_mutation_extensions"][0]["typed_config"]["mutations"]
    assert [one["remove_on_match"]["key_matcher"]["prefix"] for one in mutations] == ["x-shoal-", "x_shoal_"]


def test_without_a_policy_nothing_is_added() -> None:
    made = manager(None)
    assert [one["name"] for one in made["http_filters"]] == [*WEB, "envoy.filters.http.router"]
    assert [one["name"] for one in made["early_header_mutation_extensions"]] == ["connection"]
    assert "rds" not in made


def test_the_files_of_a_policy_name_what_is_in_them(signer: Signer, tmp_path: Path) -> None:
    envoy_access.write(policy(signer), tmp_path, SERVICES, SHARED)
    for name in ("shoal.callers", "shoal.rules", "shoal.hosts"):
        document = json.loads((tmp_path / f"{name}.json").read_text())
        (resource,) = document["resources"]
        assert resource["name"] == name
        before = document["version_info"]
        envoy_access.write(policy(signer), tmp_path, SERVICES, SHARED)
        assert json.loads((tmp_path / f"{name}.json").read_text())["version_info"] == before


def test_tokens_go_to_no_service_and_expire(signer: Signer) -> None:
    hosts = envoy_access.hosts(policy(signer), SHARED)
    claims = ["x-shoal-issuer", "x-shoal-key", "x-shoal-role", "x-shoal-subject", "x-shoal-unseen-key-id"]
    removed = ["x-forwarded-proto", "authorization", *claims]
    assert hosts["virtual_hosts"][0]["request_headers_to_remove"] == removed
    providers = access.callers(policy(signer), SERVICES)["providers"]
    assert providers.keys() == {"issuer-0", "nobody"}
    for provider in providers.values():
        assert provider["require_expiration"] is True
        assert provider["forward"] is False


@pytest.mark.parametrize(
    ("signers", "issuers", "keys", "tokens"), [(1, 1, 2048, 1024), (2, 0, 1024, 0), (0, 2, 0, 512), (1, 15, 2048, 68)]
)
def test_the_verified_tokens_that_envoy_keeps_have_a_bound(
    signer: Signer, signers: int, issuers: int, keys: int, tokens: int
) -> None:
    """Each is kept for good, with up to 45 times its size, by each thread: 2,048 of each issuer filled the heap."""
    prefixes = ["shoal_"] * signers + [""] * issuers
    several = [issuer(signer, issuer=f"issuer-{n}", token_prefix=prefix) for n, prefix in enumerate(prefixes)]
    providers = access.callers(policy(signer, issuers=several), SERVICES)["providers"]
    caches = [provider["jwt_cache_config"] for name, provider in providers.items() if name != "nobody"]
    sizes = [keys] * signers + [tokens] * issuers
    assert caches == [{"jwt_cache_size": size, "jwt_max_token_size": 2048} for size in sizes]


def test_every_path_needs_a_token_unless_its_group_is_open(signer: Signer) -> None:
    closed = access.callers(policy(signer), SERVICES)["rules"]
    assert all("requires" in rule for rule in closed)
    rules = access.callers(policy(signer, open=["health"]), SERVICES)["rules"]
    free = [rule["match"] for rule in rules if "requires" not in rule]
    rpcs = {match["path"].rpartition("/")[2] for match in free if "path" in match}
    assert rpcs == {"Check", "Watch", "List", "ServerLive", "ServerReady"}
    rest = {match["safe_regex"]["regex"].partition("(")[0] for match in free if "path" not in match}
    assert rest == {"/v2/health/live", "/v2/health/ready"}
    assert rules[-1]["match"] == {"prefix": "/"}


def test_other_host_names_are_refused_once_the_policy_has_names(signer: Signer) -> None:
    served, other = envoy_access.hosts(policy(signer, hosts=["a.example"]), SHARED)["virtual_hosts"]
    assert served["domains"] == ["a.example"]
    assert (other["domains"], other["routes"][0]["direct_response"]["status"]) == (["*"], 421)


def test_the_rules_of_many_grants_and_revoked_keys_stay_small(signer: Signer) -> None:
    grants = [
        {"name": f"g{number}", "tenants": [f"t{number}"], "roles": ["user"], "models": ["*"]} for number in range(1_000)
    ]
    small = policy(signer, issuers=[issuer(signer)], grants=grants[:1])
    large = policy(signer, issuers=[issuer(signer)], grants=grants)
    assert access.rules(large, SERVICES) == access.rules(small, SERVICES)
    revoked = [f"k-{number:016x}" for number in range(10_000)]
    assert len(json.dumps(access.rules(policy(signer, revoked=revoked), SERVICES))) < 4 << 20


def test_a_policy_needs_envoy_in_front() -> None:
    envoy = {"SHOAL_ENVOY_BINARY": "/bin/true"}
    assert choose("auto", "127.0.0.1:8001", envoy, is_insecure=False, has_policy=True).name == "envoy"
    with pytest.raises(InvalidArgument, match="--front h2 with --policy"):
        choose("h2", "127.0.0.1:8001", envoy, is_insecure=True, has_policy=True)
    with pytest.raises(FailedPrecondition, match="--policy needs an Envoy") as caught:
        choose("auto", "0.0.0.0:8001", {"SHOAL_ENVOY_BINARY": "/none"}, is_insecure=True, has_policy=True)
    assert "--front h2" not in caught.value.message


@pytest.mark.parametrize("has_policy", [False, True])
@pytest.mark.parametrize("has_tls", [False, True])
def test_an_address_that_others_reach_needs_a_policy_and_tls(has_policy: bool, has_tls: bool) -> None:
    protection = {"has_policy": has_policy, "has_tls": has_tls}
    exposure.check("--host", "127.0.0.1:1", **protection, is_insecure=False)
    exposure.check("--host", "0.0.0.0:1", **protection, is_insecure=True)
    if has_policy and has_tls:
        exposure.check("--host", "0.0.0.0:1", **protection, is_insecure=False)
        return
    with pytest.raises(InvalidArgument, match=r"--host 0\.0\.0\.0:1: other machines can reach this address") as caught:
        exposure.check("--host", "0.0.0.0:1", **protection, is_insecure=False)
    assert ("--policy FILE" in caught.value.message) is not has_policy
    assert ("in plaintext" in caught.value.message) is not has_tls
