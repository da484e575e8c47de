"""`shoal keys` and `shoal policy`, as a user types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shoal.cli.main import main

POLICY = """
version: 1
issuers:
  - {issuer: shoal, audiences: [shoal], token_prefix: shoal_, jwks_file: keys.jwks.json}
grants:
  - {name: roles, models: ["*"]}
  - {name: no-secrets, tenants: [acme], deny: [infer], models: ["secret*"]}
"""


SIGNER = ("--signer", "signer.json")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run `shoal ARGS` in an empty folder; return the exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHOAL_TOKEN", raising=False)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return run


def test_from_a_signer_to_an_explanation(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("keys", "init")[0] == 0
    (tmp_path / "policy.yaml").write_text(POLICY)
    assert run("policy", "check", "policy.yaml")[:2] == (
        0,
        "policy.yaml: valid: 1 issuers, 2 grants, 0 revoked keys\n",
    )
    options = ("--tenant", "acme", "--role", "user", "--models", "ocr*", "--models", "secret1", "--expires", "12h")
    status, key, note = run("keys", "create", *SIGNER, *options)
    assert (status, key.count("\n")) == (0, 1)
    assert "to revoke it" in note
    assert key.strip() not in note
    for model, expected, rule in [
        ("ocr-1", 0, "allowed: grant 'roles' allows infer of the model 'ocr-1'"),
        ("secret1", 1, "refused: grant 'no-secrets' denies infer of the model 'secret1'"),
        ("det", 1, "refused: the key is not for the model 'det'"),
    ]:
        monkeypatch.setenv("SHOAL_TOKEN", key.strip())
        status, said, _ = run("policy", "explain", "policy.yaml", "--call", "ModelInfer", "--model", model)
        assert (status, said.splitlines()[-1]) == (expected, rule)
        assert key.strip() not in said
        for call in ("Submit", "PutSchedule", "SubmitBatch"):
            status, said, _ = run("policy", "explain", "policy.yaml", "--call", call, "--model", model)
            assert (status, said.splitlines()[-1].endswith(rule.partition(": ")[2])) == (expected, True), call
    monkeypatch.delenv("SHOAL_TOKEN")
    status, said, _ = run("policy", "explain", "policy.yaml", "--call", "ModelInfer", "--key", key.strip()[:-4])
    assert status == 1
    assert "caller: not verified" in said
    id = json.loads(run("keys", "create", *SIGNER, "--tenant", "a", "--role", "user", "--json")[1])["id"]
    assert id.startswith("k-")


def test_explain_names_the_limits_that_hold(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("keys", "init")[0] == 0
    key = run("keys", "create", *SIGNER, "--tenant", "acme", "--role", "user")[1].strip()
    limits = """
limits:
  - {name: plan, roles: [user], requests_per_second: 10, requests_in_flight: 4}
  - {name: ocr, models: ["ocr*"], per: key, rows_per_second: 0.5}
  - {name: others, except_tenants: [acme], requests_per_second: 1}
"""
    (tmp_path / "node.yaml").write_text(POLICY + limits)
    assert run("policy", "check", "node.yaml")[1] == "node.yaml: valid: 1 issuers, 2 grants, 3 limits, 0 revoked keys\n"
    monkeypatch.setenv("SHOAL_TOKEN", key)
    plan = "limit:  'plan': 10 requests a second (burst 10), 4 requests in flight of each tenant"
    for model, expected in (
        ("det", [plan]),
        ("ocr-1", [plan, "limit:  'ocr': 0.5 rows a second (burst 1) of each key"]),
    ):
        status, said, _ = run("policy", "explain", "node.yaml", "--call", "ModelInfer", "--model", model)
        assert (status, [line for line in said.splitlines() if line.startswith("limit")]) == (0, expected)
    many = "".join(f"  - {{name: l{number}, requests_per_second: 1}}\n" for number in range(5))
    (tmp_path / "node.yaml").write_text(f"{POLICY}limits:\n{many}")
    assert "more than 4 limits of requests a second may hold for one caller" in run("policy", "check", "node.yaml")[2]


def test_explain_shows_the_objectives_of_the_model(run, tmp_path: Path) -> None:
    assert run("keys", "init")[0] == 0
    stated = "objectives:\n  - {name: ocr, models: ['ocr*'], latency_ms: 50, latency_percent: 95}\n"
    (tmp_path / "node.yaml").write_text(POLICY + stated)
    assert "2 grants, 1 objectives, 0 revoked keys" in run("policy", "check", "node.yaml")[1]
    for model, within in (
        ("ocr-1", "95 % of these within 50 ms"),
        ("det", "99 % of these within its own latency goal"),
    ):
        said = run("policy", "explain", "node.yaml", "--call", "ModelInfer", "--model", model)[1]
        assert f"objectives: 99.9 % of the requests succeed, {within}" in said.splitlines()
    assert "objectives" not in run("policy", "explain", "node.yaml", "--call", "ModelInfer")[1]


def test_errors_say_what_to_do(run, tmp_path: Path) -> None:
    assert (
        "make a signer with `shoal keys init`" in run("keys", "create", *SIGNER, "--tenant", "a", "--role", "user")[2]
    )
    assert run("keys", "init")[0] == 0
    assert "exists already" in run("keys", "init")[2]
    assert "exists already" in run("keys", "init", "--jwks", "other.json")[2]
    for expires in ("90", "d", "1y", "-1d", "0d", "9999999999d"):
        for signer in (SIGNER, ()):
            status, _, said = run("keys", "create", *signer, "--tenant", "a", "--role", "user", "--expires", expires)
            assert status == 2, said
    (tmp_path / "bad.yaml").write_text("version: 1\nissuers: []\ngrants:\n  - {name: x}\n")
    status, _, said = run("policy", "check", "bad.yaml")
    assert status == 2
    assert "bad.yaml:4: grants[0].models: Field required" in said
    (tmp_path / "policy.yaml").write_text(POLICY)
    assert "there is no such RPC" in run("policy", "explain", "policy.yaml", "--call", "Fly")[2]


def test_the_schema_is_json(run) -> None:
    status, said, _ = run("policy", "schema")
    assert status == 0
    assert json.loads(said)["title"] == "Policy"


def test_a_server_with_an_invalid_policy_does_not_start(run, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "policy.yaml").write_text("version: 1\n")
    status, _, said = run("serve", "models", "--policy", "policy.yaml", "--port", "0")
    assert status == 2
    assert "policy.yaml:1: issuers: Field required" in said


def test_a_policy_without_tls_is_refused_where_other_machines_can_reach_the_address(run, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert run("keys", "init")[0] == 0
    (tmp_path / "policy.yaml").write_text(POLICY)
    status, _, said = run("serve", "models", "--policy", "policy.yaml", "--port", "0", "--host", "0.0.0.0")
    assert status == 2
    assert "--insecure" in said


@pytest.mark.parametrize(
    "applied",
    [[], {"document": None, "files": ["keys.json"], "version": 3}, {"document": 4, "files": {}, "version": 3}],
)
def test_a_file_that_is_no_copy_of_a_policy_is_not_restored(run, tmp_path: Path, applied: object) -> None:
    (tmp_path / "policy.json").write_text(json.dumps({"applied": applied}))
    status, _, said = run("policy", "restore", "--data-dir", ".")
    assert status != 0
    assert said.startswith("shoal: policy.json is no copy of a policy (")
