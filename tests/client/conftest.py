"""A small server that answers as a test tells it, on the real wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.served import Served


@pytest.fixture
def served() -> Iterator[Served]:
    """A server without handlers, running; `served.on(method, behaviour)` gives it some at any time."""
    server = Served().start()
    yield server
    server.close()
