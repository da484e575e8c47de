"""A store without its front, as the tests of collecting have it; and one that counts more often than once a second."""

import pytest

from services.store.usage import counters
from tests.store.garbage.conftest import parts, threads

__all__ = ["parts", "threads"]


@pytest.fixture(autouse=True)
def _counts_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests wait for counts."""
    monkeypatch.setattr(counters, "FLUSH_S", 0.1)
