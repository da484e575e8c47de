"""`shoal support bundle`: what is in it, and that no secret is."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.diagnosis import bundle
from shoal.cli.diagnosis.redaction import REDACTED, redact, without_headers
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
        ("x-api-key: abc123def", "abc123def"),
        ("x-goog-api-key:abc123def", "abc123def"),
        ("authorization: ApiKey 4711-abc", "4711-abc"),
        ("Cookie: session=4711abc; other=1", "4711abc"),
        ('{"set-cookie": "session=4711abc"}', "4711abc"),
        ("{'password': 'hunter2'}", "hunter2"),
        ("password: hunter2", "hunter2"),
        ('sasl.password = "hunter2"', "hunter2"),
        ('"sasl.password" = "hunter2"', "hunter2"),
        (r"sasl.jaas.config=Plain username=\"ann\" password=\"hunter2\";", "hunter2"),
        (r'{"options": "password=\"hunter2\""}', "hunter2"),
        (r'{"a": "{\"b\": \"{\\\"password\\\": \\\"hunter2\\\"}\"}"}', "hunter2"),
        ("mongod --keyFilePassword hunter2 --port 1", "hunter2"),
        ("argv: tool --api-token hunter2-4711", "hunter2-4711"),
        ("redis://:hunter2@cache:6379/0", "hunter2"),
        ("address lookup failed for ann:hunter2@127.0.0.1:9: Misformatted", "hunter2"),
        ("https://ghp-like-token@git.example/x.git", "ghp-like-token"),
        ("https://b.s3.example/x?X-Amz-Credential=AKID4711&X-Amz-Signature=abcdef99", "abcdef99"),
        ("https://b.blob.example/x?sv=1&sig=abc%2Bdef99&se=2", "abc%2Bdef99"),
        ("https://maps.example/x?key=4711abcdef", "4711abcdef"),
        ("AccountName=a;AccountKey=4711abc==;EndpointSuffix=x", "4711abc=="),
        ("OTEL_RESOURCE_ATTRIBUTES=team=a,api.key=4711abc", "4711abc"),
        ("push by AKIAIOSFODNN7EXAMPLE failed", "AKIAIOSFODNN7EXAMPLE"),
        ("hub: hf_abcdefghijklmnopqrstuvwx", "hf_abcdefghijklmnopqrstuvwx"),
        ("-----BEGIN PRIVATE KEY-----\nMHcCAQEE\nAAAA", "MHcCAQEE"),
        ("MHcCAQEE\nAAAA\n-----END RSA PRIVATE KEY-----\nnext", "MHcCAQEE"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQOYBF\n-----END PGP PRIVATE KEY BLOCK-----", "lQOYBF"),
        (json.dumps({"pem": "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----\n"}), "MHcCAQEE"),
        (json.dumps({"message": 'with "quotes" and \n lines'}), "quotes"),
        ("GET /x?of=with%2B%2F%2Bslash", "%2F"),
    ],
)
def test_secrets_are_redacted_by_value_and_by_form(text: str, secret: str) -> None:
    redacted = redact(text, ["correct-horse\n", "short", 'with "quotes" and \n lines', "with+/+slash"])
    assert secret not in redacted
    assert REDACTED in redacted


@pytest.mark.parametrize(
    "unit",
    [
        "a1",
        "eyJaaaaaaaa-",
        "a.",
        "://a",
        ":",
        "secret",
        "-----BEGIN PRIVATE KEY-----",
        "token: ",
        "cookie:",
        "?key=",
        "a:",
        ".:a",
    ],
)
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


def test_a_bundle_that_is_interrupted_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    data, archive = tmp_path / "data", tmp_path / "b.tar.gz"
    (data / "logs").mkdir(parents=True)
    begun: list[bool] = []

    def interrupted(*_: object) -> tuple[bytes, bool]:
        begun.append(archive.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "_head", interrupted)
    done = CliRunner().invoke(app, ["support", "bundle", "--data-dir", str(data), "-o", str(archive)])
    assert (done.exit_code != 0, begun, archive.exists()) == (True, [True], False)


def test_a_bundle_is_bounded_and_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(bundle, "LOG_BYTES", 10_000)
    monkeypatch.setattr(bundle, "BUNDLE_BYTES", 60_000)
    data, archive = tmp_path / "data", tmp_path / "b.tar.gz"
    (data / "logs").mkdir(parents=True)
    for n in range(9):
        lines = "".join(f"line {i} of {n} {'x' * 80}\n" for i in range(200))
        (data / "logs" / f"infer-{n}.log").write_text(lines)
        (data / "logs" / f"infer-{n}.log.1").write_text(lines)
    done = CliRunner().invoke(app, ["support", "bundle", "--data-dir", str(data), "-o", str(archive)])
    assert done.exit_code == 0, done.output
    with tarfile.open(archive) as opened:
        texts = {Path(one.name).relative_to("b").as_posix(): _read(opened, one) for one in opened.getmembers()}
    left_out = texts.pop("left_out.txt")
    assert sum(len(text) for text in texts.values()) <= 60_000
    kept = texts["logs/infer-0.log"]
    # Whole lines: a part of one may be a part of a secret.
    assert kept.startswith("line ")
    cut = len((data / "logs" / "infer-0.log").read_bytes()) - len(kept)
    assert f"logs/infer-0.log: the first {cut} bytes\n" in left_out
    assert "logs/infer-8.log.1: all of it, since the bundle has" in left_out


def test_the_cut_of_a_long_page_leaves_no_part_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PAGE_BYTES", 500_000)
    secret = "correct-horse-" * 20
    # Redacted, the page is far shorter than the bound.
    text = f"{'x' * 200_000}\n" + f"{secret}\n" * 4_000
    body, is_cut = bundle._head(text, [secret])
    assert is_cut
    assert b"horse" not in body
    assert bundle._head("short", [secret]) == (b"short", False)


def test_headers_that_envoy_sends_are_left_out_of_its_configuration() -> None:
    document = {
        "grpc_services": [{"initial_metadata": [{"key": "x-vendor", "value": "4711"}]}],
        "key": "a",
        "value": "b",
    }
    assert without_headers(document) == {
        "grpc_services": [{"initial_metadata": [{"key": "x-vendor", "value": REDACTED}]}],
        "key": "a",
        "value": "b",
    }
