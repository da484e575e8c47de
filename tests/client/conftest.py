"""A small server that answers as a test tells it, on the real wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.served import Served


@pytest.fixture(params=["lean", "grpc"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What carries the calls: to this machine, or as if the servers here were on others."""
    name: str = request.param
    if name == "grpc":
        monkeypatch.setattr("shoal.client.transport.calls.is_local", lambda address: False)
        for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.delenv(variable, raising=False)
    return name


@pytest.fixture
def served(transport: str) -> Iterator[Served]:
    """A server without handlers, running; `served.on(method, behaviour)` gives it some at any time. Its tests run over
    both transports."""
    server = Served().start()
    yield server
    server.close()
