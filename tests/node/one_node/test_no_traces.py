"""A node that was given no collector of traces exports none."""

from __future__ import annotations

import urllib.request
from typing import Any

import pytest

pytestmark = pytest.mark.node


def test_without_the_variables_nothing_is_exported(running: Any) -> None:
    # Node keeps the variable from a node that a test does not give it to.
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in running.environ
    with urllib.request.urlopen(f"http://{running.admin}/config_dump?resource=dynamic_listeners", timeout=20) as answer:
        dump = answer.read().decode()
    assert "gateway" in dump
    assert "opentelemetry" not in dump.lower()
