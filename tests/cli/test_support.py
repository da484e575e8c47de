"""`shoal support bundle`: what is in it, and that no secret is."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.diagnosis.redaction import REDACTED, redact
from shoal.cli.main import app

TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"
KEY = f"shoal_{TOKEN}"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"the key {KEY} was refused", KEY),
        (f"authorization: Bearer {TOKEN}", TOKEN),
        ('{"Authorization": "Basic YW5uOmh1bnRlcjI="}', "YW5uOmh1bnRlcjI="),
        ("mongodb://ann:hunter2@db.example/?replicaSet=rs0", "hunter2"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----", "MHcCAQEE"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI", "wJalrXUtnFEMI"),
        ('{"client_secret": "s3cr3t-value", "x": 1}', "s3cr3t-value"),
        ("SHOAL_INGEST_GOOGLE_TOKEN=ya29.a0Af", "ya29.a0Af"),
        ("of this installation: correct-horse", "correct-horse"),
        ('{"password": "my whole phrase"}', "phrase"),
        ('{"password": "a\\"quoted phrase"}', "phrase"),
        (r'{"message": "{\"password\": \"hunter2\"}"}', "hunter2"),
        ("OTEL_EXPORTER_OTLP_HEADERS=x-honeycomb-team=abcdef123456,x=y", "abcdef123456"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS=Authorization=Bearer%20abc123", "abc123"),
        ("x-api-key=abc123", "abc123"),
    ],
)
def test_secrets_are_redacted_by_value_and_by_form(text: str, secret: str) -> None:
    redacted = redact(text, ["correct-horse\n", "short"])
    assert secret not in redacted
    assert REDACTED in redacted


@pytest.mark.parametrize("unit", ["a1", "eyJaaaaaaaa-", "a.", "://a", ":", "secret", "-----BEGIN PRIVATE KEY-----"])
def test_a_long_line_is_redacted_in_linear_time(unit: str) -> None:
    # With quadratic patterns it takes minutes.
    text = "://" + unit * (400_000 // len(unit))
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "text",
    [
        "model digits, tenant acme, key id k-1, unix:/tmp/shoal-up-mc3tnwkh/coord-0.sock",
        "SHOAL_COORD_MASTER_KEY_SOURCE=data folder",
        '{"key_file": "/srv/shoal/admin.key", "token_prefix": "shoal_"}',
        "shoal_infer_requests_total 7, short",
        "http://127.0.0.1:8080/v2/models?x=a@b",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text, ["short"]) == text


def test_a_bundle_of_a_node_that_does_not_run_has_its_logs_and_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("SHOAL_TOKEN", "a-token-without-a-form")
    monkeypatch.setenv("SHOAL_INFER_THREADS", "4")
    data, archive = tmp_path / "data", tmp_path / "b.tar.gz"
    (data / "logs").mkdir(parents=True)
    data.chmod(0o700)
    (data / "admin.key").touch(0o600)
    (data / "admin.key").write_text("the-key-of-the-user\n")
    (data / "ports.json").write_text("{}")
    lines = ["a-token-without-a-form", "the-key-of-the-user", KEY, "ordinary"]
    (data / "logs" / "infer-0.log").write_text("\n".join(lines))
    done = CliRunner().invoke(app, ["support", "bundle", "--data-dir", str(data), "-o", str(archive)])
    assert done.exit_code == 0, done.output
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as opened:
        texts = {Path(one.name).relative_to("b").as_posix(): _read(opened, one) for one in opened.getmembers()}
    assert {"versions.json", "environment.txt", "doctor.json", "facts.json", "data/ports.json"} <= texts.keys()
    assert "ordinary" in texts["logs/infer-0.log"]
    assert "SHOAL_INFER_THREADS=4" in texts["environment.txt"]
    assert json.loads(texts["doctor.json"])["findings"][0]["check"] == "node-down"
    for name, text in texts.items():
        for secret in lines[:3]:
            assert secret not in text, name
    again = CliRunner().invoke(app, ["support", "bundle", "--data-dir", str(data), "-o", str(archive)])
    assert again.exit_code != 0
    assert "exists already" in str(again.exception or again.output)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode()


def test_a_folder_of_no_node_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["support", "bundle", "--data-dir", str(tmp_path), "-o", str(tmp_path / "b.tar.gz")])
    assert "not the data folder of a node" in str(done.exception)
