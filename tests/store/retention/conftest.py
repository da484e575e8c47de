"""What the tests of retention share with those of queries."""

from __future__ import annotations

import pytest

from tests.store.test_store_queries import Heard


@pytest.fixture
def heard() -> Heard:
    return Heard()
