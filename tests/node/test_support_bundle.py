"""`shoal support bundle` of a node that has secrets wherever it takes some: none of them is in the bundle."""

from __future__ import annotations

import contextlib
import json
import secrets
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.errors import ShoalError

pytestmark = [pytest.mark.node, pytest.mark.timeout(240)]

CONNECTORS = """
[connectors.orders]
model = "double"
format = "record"
inputs = {{ x = "FP32" }}
writes = "json"
tenant = "shop"

[connectors.orders.source]
kind = "kafka"
brokers = "127.0.0.1:9"
topic = "orders"
group = "g"
[connectors.orders.source.options]
"security.protocol" = "SASL_PLAINTEXT"
"sasl.mechanism" = "PLAIN"
"sasl.username" = "ann"
"sasl.password" = "{inline}"

[connectors.orders.sink]
kind = "kafka"
brokers = "127.0.0.1:9"
topic = "answers"
[connectors.orders.sink.options]
"security.protocol" = "SASL_PLAINTEXT"
"sasl.mechanism" = "PLAIN"
"sasl.username" = "ann"
"sasl.password" = "file:{file}"

[connectors.orders.dead_letters]
kind = "kafka"
brokers = "127.0.0.1:9"
topic = "dead"
"""


def test_no_secret_that_a_node_was_given_is_in_its_bundle(node: Any, tmp_path: Path) -> None:
    given = {
        name: f"{name}-{secrets.token_hex(12)}" for name in ("collector", "header", "inline", "file", "aws", "url")
    }
    (tmp_path / "kafka").write_text(given["file"] + "\n")
    connectors = tmp_path / "connectors.toml"
    connectors.write_text(CONNECTORS.format(inline=given["inline"], file=tmp_path / "kafka"))
    running = node(
        *("--auth", "--connectors", str(connectors)),
        env={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://ann:{given['collector']}@127.0.0.1:9",
            "OTEL_EXPORTER_OTLP_HEADERS": f"x-team=blue-team-name,x-vendor-auth={given['header']}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": given["aws"],
            "SHOAL_INFER_LOG_LEVEL": "DEBUG",
            "SHOAL_INGEST_LOG_LEVEL": "DEBUG",
        },
    )
    made = json.loads(running.shoal("keys", "create", "--tenant", "acme", "--role", "user", "--json").stdout)
    key = made["key"]
    with shoal.Client(running.gateway, token=key) as client, contextlib.suppress(ShoalError):
        client.infer("absent", {"x": [[1.0]]})
    request = urllib.request.Request(
        f"http://{running.gateway}/v2/models/absent?access_token={given['url']}",
        headers={"authorization": f"Bearer {given['url']}", "x-api-key": given["url"], "cookie": f"s={given['url']}"},
    )
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=30)
    own = [path.read_text().strip() for path in running.data_dir.glob("*.key")]
    assert own
    archive = tmp_path / "bundle.tar.gz"
    running.environ.pop("AWS_SECRET_ACCESS_KEY")
    for name in [name for name in running.environ if name.startswith("OTEL_")]:
        running.environ.pop(name)
    running.shoal("support", "bundle", "-o", str(archive), timeout_s=120)
    with tarfile.open(archive) as opened:
        texts = {member.name: _read(opened, member) for member in opened.getmembers()}
    assert {"bundle/metrics.txt", "bundle/envoy/config_dump.json", "bundle/data/envoy.json"} <= texts.keys()
    # The collector's headers are in Envoy's configuration by their names.
    assert "x-vendor-auth" in texts["bundle/envoy/config_dump.json"]
    assert "connectors" in texts["bundle/status.json"]
    assert json.loads(texts["bundle/history.json"])["model"]["coord"] == "local/coord-0"
    assert json.loads(texts["bundle/spans.json"])["silent"] == []
    for name, text in texts.items():
        for secret in (*given.values(), *own, key, "blue-team-name"):
            assert secret not in text, name
            assert secret[-16:] not in text, name
    assert "never in a bundle" in texts["bundle/left_out.txt"]


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode()
