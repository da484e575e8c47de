"""A store without its front, as the tests of collecting have it."""

from tests.store.collecting.conftest import parts, threads

__all__ = ["parts", "threads"]
