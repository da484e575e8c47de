"""The memory of open requests by tenant: in the node's metrics and in `shoal top`, and gone with the requests."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from collections import defaultdict
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

import shoal
from shoal.cli.diagnosis import checks, gather
from shoal.cli.main import app
from shoal.discovery import running_nodes
from tests.breakable import until

pytestmark = pytest.mark.node

MIB = 1 << 20
BODIES = {"acme": 8 * MIB, "small": 1 * MIB}


def held(admin: str) -> dict[str, float]:
    """Bytes that requests hold by tenant, in all processes of the node."""
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=30) as response:
        page = response.read().decode()
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        if family.name == "shoal_connection_memory_tenant_bytes":
            for sample in family.samples:
                found[sample.labels.get("tenant", "")] += sample.value
    return found


def begin(gateway: str, tenant: str, size: int) -> socket.socket:
    """Begin a request whose body lacks its last byte, so that the server holds what it has."""
    host, _, port = gateway.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(
        f"POST /v2/models/double/infer HTTP/1.1\r\nhost: {gateway}\r\nx-shoal-tenant: {tenant}\r\n"
        f"content-type: application/json\r\ncontent-length: {size + 1}\r\n\r\n".encode()
    )
    connection.sendall(b" " * size)
    return connection


def test_who_holds_the_memory_of_requests_is_named(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    open_requests = [begin(running.gateway, tenant, size) for tenant, size in BODIES.items()]
    try:
        asyncio.run(
            until(
                lambda: all(held(running.admin).get(tenant, 0) >= size for tenant, size in BODIES.items()),
                "both tenants hold their requests",
                60,
            )
        )
        command = f"top --by tenant --sort memory --once --json --every 0.2 --admin {running.admin}"
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, done.output
        rows = [row for row in json.loads(done.output)["rows"] if row["name"] in BODIES]
        assert [row["name"] for row in rows] == ["acme", "small"]
        assert 8 * MIB <= rows[0]["memory_bytes"] < 32 * MIB
        monkeypatch.setattr(checks, "MEMORY_NEAR_SHARE", 0.01)
        [node] = running_nodes(running.environ)
        with shoal.Client(running.gateway) as client:
            findings = checks.diagnose(gather.of_node(client, node))
        [near] = [finding for finding in findings if finding.check == "memory-near-limit"]
        assert "tenant acme holds 8 MiB" in near.what
        assert near.command == "shoal top --by tenant --sort memory"
    finally:
        for connection in open_requests:
            connection.close()
    asyncio.run(
        until(
            lambda: not any(held(running.admin).get(tenant, 0) for tenant in BODIES),
            "the requests hold nothing more",
            60,
        )
    )
