"""A store without its front, as the tests of collecting have it."""

from tests.store.garbage.conftest import parts, threads

__all__ = ["parts", "threads"]
