"""`shoal keys` and `shoal policy`, against a coord that answers what a test tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from shoal.access import cluster, tokens
from shoal.access.policy import Policy
from shoal.client.transport import methods
from shoal.coord.v1 import access_pb2 as pb
from tests.access import policies
from tests.cli.conftest import Shoal
from tests.client.served import Served

DOCUMENT = {
    "version": 1,
    "issuers": [{"issuer": "shoal", "audiences": ["shoal"], "token_prefix": "shoal_", "cluster": True}],
    "grants": [{"name": "roles", "models": ["*"]}, {"name": "night", "by_name": True, "models": ["*"]}],
    "roles": {"auditor": ["read"]},
}


class Coord:
    """A coord with one policy in force and some keys."""

    def __init__(self, served: Served, folder: Path) -> None:
        made = tokens.create_signer(folder / "signer.json")
        # As coord does: each signer is an issuer of its own.
        self.signer = replace(made, issuer=cluster.issuer_name("shoal", made.kid))
        self.policy: Policy = policies.policy(self.signer, roles=DOCUMENT["roles"], grants=DOCUMENT["grants"])
        self.keys: list[pb.KeyInfo] = []
        self.revoked: list[str] = []
        self.is_admin = True
        served.on(methods.GET_POLICY, self._get_policy)
        served.on(methods.LIST_KEYS, self._list_keys)
        served.on(methods.CREATE_KEY, self._create_key)
        served.on(methods.REVOKE_KEY, self._revoke_key)

    async def _get_policy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        await self._check(context)
        return pb.GetPolicyResponse(in_force=self.policy.model_dump_json())

    async def _list_keys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        await self._check(context)
        return pb.ListKeysResponse(keys=self.keys)

    async def _create_key(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        return pb.CreateKeyResponse(info=info("k-1", request.role), key="shoal_a.b.c")

    async def _revoke_key(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        self.revoked.append(request.id)
        return pb.RevokeKeyResponse()

    async def _check(self, context: Any) -> None:
        if not self.is_admin:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied")


def info(id: str, role: str, **fields: Any) -> pb.KeyInfo:
    made = pb.KeyInfo(id=id, tenant="acme", role=role, subject="ann", models=["ocr*"], **fields)
    made.expires_at.FromSeconds(2_000_000_000)
    return made


@pytest.fixture
def coord(served: Served, tmp_path: Path) -> Coord:
    return Coord(served, tmp_path)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A document that denies what the policy in force allows."""
    grants = [*DOCUMENT["grants"], {"name": "closed", "deny": ["infer"], "models": ["ocr-2"]}]
    (tmp_path / "next.yaml").write_text(yaml.safe_dump({**DOCUMENT, "grants": grants}))
    return tmp_path / "next.yaml"


@pytest.mark.parametrize("is_id", [False, True])
def test_a_document_is_explained_with_the_keys_of_the_cluster(
    coord: Coord, document: Path, shoal: Shoal, is_id: bool
) -> None:
    key = policies.key(coord.signer, models=["ocr*"])
    coord.keys = [info(key.id, "user", signer=coord.signer.kid)]
    asked = ("--key", key.id if is_id else key.text, "--call", "ModelInfer", "--model")
    for file, model, status, decision in (
        ([], "ocr-2", 0, "allowed: grant 'roles'"),
        ([document.name], "ocr-1", 0, "allowed: grant 'roles'"),
        ([document.name], "ocr-2", 1, "refused: grant 'closed' denies"),
        ([document.name], "det", 1, "refused: the key is not for the model 'det'"),
    ):
        done = shoal("policy", "explain", *file, *asked, model)
        assert (done.returncode, done.stdout.splitlines()[-1][: len(decision)]) == (status, decision), done


def test_a_document_of_a_server_is_explained_without_a_node(tmp_path: Path, shoal: Shoal) -> None:
    signer = tokens.create_signer(tmp_path / "signer.json")
    policies.write(tmp_path / "policy.yaml", policies.document(signer))
    asked = ("policy", "explain", "policy.yaml", "--call", "ModelInfer", "--model", "m", "--key")
    # Nothing answers there.
    nowhere = {"SHOAL_GATEWAY": "127.0.0.1:1"}
    assert shoal(*asked, policies.key(signer).text, **nowhere).returncode == 0
    done = shoal(*asked, policies.key(signer).text[:-4], **nowhere)
    assert (done.returncode, "caller: not verified" in done.stdout) == (1, True)


def test_who_may_not_read_the_policy_in_force_hears_who_may(coord: Coord, shoal: Shoal) -> None:
    coord.is_admin = False
    done = shoal("policy", "explain", "--call", "ModelInfer")
    assert (done.returncode, "shown to callers with the group administer" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--role", "user"), []),
        (("--role", "auditor", "--grant", "night"), []),
        (("--role", "usr"), ["warning: the policy has no role 'usr'"]),
        (("--role", "user", "--grant", "roles"), ["warning: the policy has no grant 'roles' with by_name"]),
    ],
)
def test_a_key_for_a_role_or_grant_that_the_policy_lacks_is_made_with_a_warning(
    coord: Coord, shoal: Shoal, options: tuple[str, ...], expected: list[str]
) -> None:
    done = shoal("keys", "create", "--tenant", "acme", *options)
    assert (done.returncode, done.stdout) == (0, "shoal_a.b.c\n")
    said = [line.partition(": the key has")[0] for line in done.stderr.splitlines() if line.startswith("warning")]
    assert said == expected


def test_a_key_is_made_also_where_the_policy_cannot_be_read(coord: Coord, shoal: Shoal) -> None:
    coord.is_admin = False
    assert shoal("keys", "create", "--tenant", "acme", "--role", "usr").stdout == "shoal_a.b.c\n"


@pytest.mark.parametrize(
    ("id", "warning"),
    [
        ("k-user", ""),
        ("k-usr", "warning: the cluster has signed no key k-usr that has not expired"),
        ("k-admin", "warning: no key with the role admin is left: restart the node"),
    ],
)
def test_a_revocation_of_no_key_or_of_the_last_admins_says_so(
    coord: Coord, shoal: Shoal, id: str, warning: str
) -> None:
    coord.keys = [info("k-user", "user"), info("k-admin", "admin"), info("k-gone", "admin", revoked=True)]
    done = shoal("keys", "revoke", id)
    assert (done.returncode, done.stdout, coord.revoked) == (0, f"{id} is revoked everywhere\n", [id])
    assert done.stderr.startswith(warning) if warning else done.stderr == ""


def test_where_admins_have_other_tokens_the_end_of_a_users_key_is_no_warning(coord: Coord, shoal: Shoal) -> None:
    coord.keys = [info("k-user", "user")]
    assert shoal("keys", "revoke", "k-user").stderr == ""


def test_a_key_is_revoked_also_where_the_keys_cannot_be_listed(coord: Coord, shoal: Shoal) -> None:
    coord.is_admin = False
    assert (shoal("keys", "revoke", "k-1").returncode, coord.revoked) == (0, ["k-1"])


def test_the_new_key_after_a_theft_is_alone_on_standard_output_and_explained(served: Served, shoal: Shoal) -> None:
    async def rotate(request: pb.RotateSignerRequest, context: Any) -> pb.RotateSignerResponse:
        return pb.RotateSignerResponse(signer="k-2", key="shoal_a.b.c" if request.renew_own_key else "")

    served.on(methods.ROTATE_SIGNER, rotate)
    done = shoal("keys", "rotate", "--stolen")
    assert (done.returncode, done.stdout) == (0, "shoal_a.b.c\n")
    assert "this is your new key" in done.stderr
    assert shoal("keys", "rotate").stdout == ""
