"""The policy document: what is valid, and the errors of what is not."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jwt.utils import to_base64url_uint

from shoal.access import limits, tokens
from shoal.access import policy as policies
from shoal.access.policy import BYTES, GRANTS, KEYS, Policy
from shoal.access.tokens import Signer
from shoal.errors import InvalidArgument
from tests.access.policies import document, issuer, policy


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


def error(text: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        policies.parse(text, "p.yaml")
    return caught.value.message


def error_of(signer: Signer, **parts: Any) -> str:
    return error(yaml.safe_dump(document(signer, **parts)))


def test_a_policy_survives_its_way_to_the_workers(signer: Signer) -> None:
    made = policy(signer, hosts=["a.example", "*.b.example"], revoked=["k-1"], open=["health"])
    assert Policy.model_validate_json(made.model_dump_json()) == made


def test_each_error_names_its_line_and_path() -> None:
    text = """version: 1
issuers:
  - issuer: shoal
    audience: [shoal]
    jwks: {keys: []}
grants:
  - name: first
    models: ["*"]
    allow: [infer, fly]
"""
    assert error(text).splitlines() == [
        "p.yaml:3: issuers[0].audiences: Field required",
        "p.yaml:5: issuers[0].jwks: expected a JSON Web Key Set with 1 to 8 keys in 'keys'",
        "p.yaml:4: issuers[0].audience: there is no such key",
        "p.yaml:9: grants[0].allow[1]: Input should be '*', 'health', 'read', 'infer', 'jobs', 'models', 'code', "
        "'operate' or 'administer'",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the document is empty"),
        ("version: [", "p.yaml:2: not YAML"),
        ("version: 1\nversion: 1", "p.yaml:2: the key 'version' occurs twice"),
        ("a: &x [1]\nb: *x", "anchors and aliases are not supported"),
        ("a: {b: 1}\n? [c]\n: 1", "p.yaml:2: the key"),
        ("[" * 5000, "not YAML"),
        ("just text", "p.yaml:1: policy: Input should be"),
        ("version: !!bool maybe", "p.yaml: not YAML: a value does not fit its tag"),
        ("version: !!timestamp q", "p.yaml: not YAML: a value does not fit its tag"),
        ("version: !!int ''", "p.yaml: not YAML: a value does not fit its tag"),
    ],
)
def test_what_is_no_document_is_refused(text: str, words: str) -> None:
    assert words in error(text)


def test_an_unknown_role_and_names_that_occur_twice_are_refused(signer: Signer) -> None:
    grants = [{"name": "a", "models": ["*"], "roles": ["boss"]}]
    assert "no role 'boss': there are admin, operator" in error_of(signer, grants=grants)
    twice = [{"name": "a", "models": ["*"]}] * 2
    assert "the grant 'a' occurs twice" in error_of(signer, grants=yaml.safe_load(json.dumps(twice)))
    assert "the host 'a.example' occurs twice" in error_of(signer, hosts=["a.example", "A.example"])
    assert "the issuer 'shoal' occurs twice" in error_of(signer, issuers=[issuer(signer), {**issuer(signer)}])
    # Another one of such a name would be taken for a signer of the cluster.
    own = {key: value for key, value in issuer(signer).items() if key != "jwks"} | {"cluster": True}
    given = [own, {**issuer(signer), "issuer": "shoal:k-01234567"}]
    assert "names that begin with 'shoal:' are the cluster's own" in error_of(signer, issuers=given)


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("https://app.example/", "cors.origins[0]: String should match pattern"),
        ("app.example", "cors.origins[0]: String should match pattern"),
        ("https://App.example", "cors.origins[0]: String should match pattern"),
        ("*", "cors.origins[0]: String should match pattern"),
        ("null", "cors.origins[0]: String should match pattern"),
        ("https://a.example:443", "browsers leave the port out: use https://a.example"),
        ("http://[::1]:80", "browsers leave the port out: use http://[::1]"),
    ],
)
def test_origins_are_as_browsers_send_them(signer: Signer, origin: str, words: str) -> None:
    assert words in error_of(signer, cors={"origins": [origin]})
    known = ["https://a.example", "http://localhost:5173", "http://[::1]:8080", "http://a.example:443"]
    assert list(policy(signer, cors={"origins": known}).cors.origins) == known
    assert not policy(signer).cors.origins


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}, "this is a secret key"),
        ({"d": "c2VjcmV0"}, "this is a secret key"),
        ({"alg": "none"}, "alg 'none' is not supported"),
        ({"alg": "RS256"}, "alg 'RS256' is not supported"),
        ({"alg": None}, "'alg' is missing"),
        ({"kid": ""}, "expected an object with a 'kid'"),
        ({"kty": "RSA", "alg": "RS256", "n": "short", "e": "AQAB"}, "kty 'RSA' with alg 'RS256' is not supported"),
    ],
)
def test_only_public_keys_of_supported_algorithms_are_taken(signer: Signer, change: dict[str, Any], words: str) -> None:
    bad = {name: value for name, value in {**signer.public_jwk(), **change}.items() if value is not None}
    assert words in error_of(signer, issuers=[issuer(signer, jwks={"keys": [bad]})])


def test_numbers_that_are_no_key_are_refused(signer: Signer, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    for change in ({"x": "AAAA"}, {"y": None}, {"x": 7}):
        keys = {"keys": [{**signer.public_jwk(), **change}]}
        file.write_text(yaml.safe_dump(document(signer, issuers=[issuer(signer, jwks=keys)])))
        with pytest.raises(InvalidArgument, match=f"the key '{signer.kid}' is no key"):
            policies.load(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 1 << 16_999 | 1}, "n is even, or has more than 16384 bits"),
        ({"n": "A" * 172 + to_base64url_uint(1 << 1_023 | 1).decode()}, "n has 1024 bits: use a key of 2048 bits"),
        ({"n": 1 << 2_047}, "n is even, or has more than 16384 bits"),
        ({"e": 1 << 40 | 1}, "e has more than 33 bits"),
        ({"n": "+" * 400}, "n is not in base64url"),
    ],
)
def test_keys_that_envoy_would_refuse_are_refused(change: dict[str, Any], words: str) -> None:
    """Envoy would keep its former keys of all issuers, also after a theft."""
    key = {"kty": "RSA", "alg": "RS256", "kid": "a", "n": 1 << 2_047 | 1, "e": 65_537, **change}
    encoded = {
        name: to_base64url_uint(value).decode() if isinstance(value, int) else value for name, value in key.items()
    }
    usable, [reason] = policies.usable_keys([encoded])
    assert usable == []
    assert words in reason


def test_a_claim_with_a_dot_in_its_name_is_refused_in_a_document_and_an_applied_one_stays_valid(signer: Signer) -> None:
    named = {"claims": {"tenant": "https://acme/org", "role": "https://acme.example/role"}, "token_prefix": ""}
    errors = error_of(signer, issuers=[issuer(signer, **named)])
    assert "claims.role: 'https://acme.example/role': a claim with a dot in its name cannot be read" in errors
    assert "claims.tenant" not in errors
    assert Policy.model_validate(document(signer, issuers=[issuer(signer, **named)])).issuers[0].claims is not None


def test_a_tenant_with_a_name_that_no_job_can_have_is_refused_and_an_applied_policy_stays_valid(signer: Signer) -> None:
    long, longest = "a" * 65, "b" * 64

    def parts(name: str) -> dict[str, Any]:
        return {
            "issuers": [issuer(signer, tenant=name)],
            "grants": [{"name": "a", "models": ["*"], "tenants": [name]}],
            "limits": [{"name": "l", "rows_per_second": 1, "tenants": [name], "except_tenants": [name]}],
            "audit": {"reads": [name]},
        }

    errors = error_of(signer, **parts(long))
    said = "a tenant has at most 64 characters, not 65: give it a shorter name"
    for place in (
        "issuers[0].tenant",
        "grants[0].tenants[0]",
        "limits[0].tenants[0]",
        "limits[0].except_tenants[0]",
        "audit.reads[0]",
    ):
        assert f"{place}: {said}" in errors
    assert Policy.model_validate(document(signer, **parts(long))).issuers[0].tenant == long
    assert policy(signer, **parts(longest)).issuers[0].tenant == longest


def test_a_set_of_keys_that_is_no_json_is_refused(signer: Signer, tmp_path: Path) -> None:
    file, keys = tmp_path / "policy.yaml", tmp_path / "k.json"
    named = issuer(signer)
    del named["jwks"]
    for change in ({"use": "\ud800"}, {"x5t": float("nan")}):
        keys.write_text(json.dumps({"keys": [{**signer.public_jwk(), **change}]}))
        file.write_text(yaml.safe_dump(document(signer, issuers=[{**named, "jwks_file": keys.name}])))
        with pytest.raises(InvalidArgument, match=r"k.json: a value of the JSON Web Key Set is no JSON"):
            policies.load(file)
    dated = {"keys": [{**signer.public_jwk(), "x5t": datetime.date(2026, 1, 1)}]}
    assert "is no JSON" in error_of(signer, issuers=[issuer(signer, jwks=dated)])


def test_an_issuer_has_few_keys(signer: Signer) -> None:
    keys = [{**signer.public_jwk(), "kid": str(number)} for number in range(KEYS + 1)]
    assert "1 to 8 keys" in error_of(signer, issuers=[issuer(signer, jwks={"keys": keys})])


def test_keys_are_given_once(signer: Signer) -> None:
    assert "one of jwks and jwks_file" in error_of(signer, issuers=[issuer(signer, jwks_file="x")])
    assert "one of jwks and jwks_file" in error_of(signer, issuers=[issuer(signer, jwks=None)])


def test_claims_of_keys_cannot_be_changed_so_that_their_models_count(signer: Signer) -> None:
    assert "claims is only for foreign tokens" in error_of(signer, issuers=[issuer(signer, claims={})])


def test_an_issuer_needs_a_tenant(signer: Signer) -> None:
    foreign = issuer(signer, token_prefix="", claims={"tenant": None})
    assert "tenant is missing" in error_of(signer, issuers=[foreign])


def test_a_document_is_bounded(signer: Signer, tmp_path: Path) -> None:
    grants = [{"name": f"g{number}", "models": ["*"]} for number in range(GRANTS + 1)]
    assert "at most 1000" in error_of(signer, grants=grants)
    file = tmp_path / "large.yaml"
    file.write_bytes(b"#" * (BYTES + 1))
    with pytest.raises(InvalidArgument, match="a policy may not be larger"):
        policies.load(file)


def test_keys_come_from_a_file_beside_the_policy(signer: Signer, tmp_path: Path) -> None:
    named = {name: value for name, value in issuer(signer).items() if name != "jwks"} | {"jwks_file": "keys.json"}
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(document(signer, issuers=[named])))
    with pytest.raises(InvalidArgument, match=r"cannot read .*keys\.json: No such file"):
        policies.load(file)
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"keys\.json: expected a JSON Web Key Set"):
        policies.load(file)
    (tmp_path / "keys.json").write_text(json.dumps(signer.jwks()))
    assert policies.load(file) == policy(signer)
    assert policies.files(file) == [file, tmp_path / "keys.json"]


def test_the_schema_describes_the_document() -> None:
    schema = policies.json_schema()
    assert {"version", "issuers", "grants", "hosts", "objectives", "revoked"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


def test_the_policies_of_the_documentation_are_valid() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "policy.md"
    documents = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(documents) == 5
    for text in documents:
        limits.check(policies.parse(text, str(page)).limits)
