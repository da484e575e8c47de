"""Causes in certificates, keys, policy and secrets of a real node, each mended by the command that is named."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from pathlib import Path

import pytest
import yaml

import shoal
from shoal.access import tokens
from shoal.client import NewKey
from tests.breakable import until
from tests.coord.test_issuer_keys import Idp
from tests.node.doctor.conftest import Ward, write_certificate

pytestmark = [pytest.mark.node, pytest.mark.timeout(300), pytest.mark.usefixtures("well")]

DAY_S = 86_400


def aged_key(ward: Ward, *, tenant: str, role: str, subject: str) -> NewKey:
    """Return a key of 90 days as it is ten days before its end: its record in etcd says when it was made."""
    made = ward.client.access.create_key(tenant=tenant, role=role, subject=subject, life_s=10 * DAY_S)

    async def age() -> None:
        async with ward.etcd() as etcd:
            entry = await etcd.get(b"/shoal-keys/" + made.info.id.encode())
            assert entry is not None
            record = json.loads(entry.value)
            record["created_at"] -= 80 * DAY_S
            await etcd.put(entry.key, json.dumps(record).encode())

    asyncio.run(age())
    return made


def test_a_certificate_that_ends_soon_is_found_until_its_files_are_renewed(ward: Ward) -> None:
    write_certificate(ward.tls, days=5)
    finding = ward.until_found("certificate-ends")
    assert "ends in 4 days" in finding.what
    assert "notAfter" in os.popen(finding.command).read()
    write_certificate(ward.tls, days=90)


def test_a_key_that_ends_soon_is_found_until_its_holder_has_another_one(ward: Ward) -> None:
    aged_key(ward, tenant="acme", role="user", subject="ann")
    finding = ward.until_found("key-ends")
    assert "of ann" in finding.what
    assert ward.run(finding).startswith("shoal_")


def test_the_key_of_the_nodes_user_is_replaced_while_the_node_runs_and_is_no_finding(ward: Ward) -> None:
    file = Path(ward.node.document()["key_file"])
    keys = ward.client.access.keys()
    [own] = [key for key in keys if key.tenant == "local" and key.role == "admin"]
    aged = aged_key(ward, tenant=own.tenant, role=own.role, subject=own.subject)
    file.write_text(aged.key)
    asyncio.run(until(lambda: file.read_text() != aged.key, "the launcher replaces the key"))
    payload = file.read_text().split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert (claims["sub"], claims["role"]) == (own.subject, "admin")
    assert claims["exp"] > time.time() + 300 * DAY_S
    assert file.stat().st_mode & 0o777 == 0o600
    ward.until_well()
    assert own.subject in ward.node.shoal("keys", "list").stdout


def test_admins_whose_keys_all_end_soon_are_found_until_one_has_another(ward: Ward) -> None:
    former, environ = ward.client, ward.node.environ
    short = former.access.create_key(tenant="local", role="admin", subject="ops", life_s=10 * DAY_S)
    keys = former.access.keys()
    others = [key.id for key in keys if key.role == "admin" and key.id != short.info.id]

    def client(token: str) -> shoal.Client:
        return shoal.Client(former.address, ca=ward.tls / "ca/ca.pem", token=token)

    with client(short.key) as ward.client:
        environ["SHOAL_TOKEN"] = short.key
        for id in others:
            ward.client.access.revoke_key(id)
        token = ward.run(ward.until_found("no-admin")).strip()
        ward.until_well()
    del environ["SHOAL_TOKEN"]
    Path(ward.node.document()["key_file"]).write_text(token)
    ward.client = client(token)


def test_a_secret_that_others_can_read_is_found_until_the_command_has_run(ward: Ward) -> None:
    (ward.node.data_dir / "master.key").chmod(0o644)
    finding = ward.until_found("secret-open")
    assert os.system(finding.command) == 0


def test_missing_and_unusable_keys_of_an_issuer_are_found_until_the_issuer_has_mended_them(ward: Ward) -> None:
    idp, signer, access = Idp(), tokens.create_signer(ward.tls / "signer.json", "idp"), ward.client.access
    before = access.policy()
    try:
        document = yaml.safe_load(before.document)
        foreign = {"issuer": idp.url, "audiences": ["a"], "tenant": "acme", "role": "user", "discovery": True}
        document["issuers"].append(foreign)
        access.apply(yaml.safe_dump(document), before.files)
        finding = ward.until_found("issuer-without-keys")
        assert idp.url in ward.run(finding)
        idp.discoverable(signer)
        good = idp.answers["/keys"]
        broken = {**signer.public_jwk(), "kid": "broken", "x": "AAAA"}
        idp.answers["/keys"] = json.dumps({"keys": [broken, signer.public_jwk()]}).encode()
        finding = ward.until_found("issuer-key-unused")
        assert idp.url in ward.run(finding)
        idp.answers["/keys"] = good
        ward.until_well()
    finally:
        access.apply(before.document, before.files)
        idp.close()
