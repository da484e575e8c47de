"""A small server that answers as a test tells it, on the real wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.client.served import Served

# No test asserts a time: a machine that is busy is slow, and that is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def served() -> Iterator[Served]:
    """A server without handlers, running; `served.on(method, behaviour)` gives it some at any time."""
    server = Served().start()
    yield server
    server.close()
