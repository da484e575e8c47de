"""The policy in force in a cluster follows from the keys in etcd."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shoal.access import cluster, tokens
from shoal.access import policy as policies
from shoal.access.cluster import POLICY, REVOKED, SIGNERS, SignerKey
from shoal.access.policy import Policy
from shoal.access.tokens import Signer
from shoal.errors import InvalidArgument, Unauthenticated

DOCUMENT = """
version: 1
issuers:
  - {issuer: shoal, audiences: [shoal], token_prefix: shoal_, cluster: true}
grants:
  - {name: roles, models: ["*"]}
revoked: [k-old]
"""


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> list[Signer]:
    folder = tmp_path_factory.mktemp("signers")
    made = [tokens.create_signer(folder / name) for name in ("a", "b")]
    return [Signer(cluster.issuer_name("shoal", one.kid), one.kid, one.private_key) for one in made]


def values(*signers: Signer, revoked: dict[str, float] | None = None) -> dict[bytes, bytes]:
    found = {
        POLICY: cluster.policy_value(3, policies.parse(DOCUMENT)),
        SIGNERS: cluster.signers_value(SignerKey(signer.public_jwk()) for signer in signers),
    }
    return found if revoked is None else {**found, REVOKED: cluster.revoked_value(revoked)}


def in_force(*signers: Signer, revoked: dict[str, float] | None = None) -> Policy:
    found = cluster.in_force(values(*signers, revoked=revoked))
    assert found is not None
    return found


def test_without_a_policy_there_is_none() -> None:
    assert cluster.in_force({}) is None
    assert cluster.version_of({}) == 0


def test_each_signer_is_an_issuer_of_its_own(signers: list[Signer]) -> None:
    now = time.time()
    keys = [tokens.create_key(signer, tenant="acme", role="user", now=now) for signer in signers]
    both = in_force(*signers)
    assert [tokens.verified_claims(both, made.text, now)["jti"] for made in keys] == [made.id for made in keys]
    # After the end of a signer its keys name no issuer: services end their streams without a look at signatures.
    second = in_force(signers[1])
    assert second.issuer_of(signers[0].issuer) is None
    with pytest.raises(Unauthenticated):
        tokens.verified_claims(second, keys[0].text, now)
    assert in_force().issuers == ()


def test_revoked_keys_join_those_of_the_document(signers: list[Signer]) -> None:
    assert in_force(*signers, revoked={"k-new": 5.0, "k-old": 6.0}).revoked == ("k-old", "k-new")
    assert cluster.version_of(values()) == 3


def test_a_file_may_not_name_the_keys_of_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(DOCUMENT)
    with pytest.raises(InvalidArgument, match="cluster is for the policy of a node"):
        policies.load(tmp_path / "p.yaml")
