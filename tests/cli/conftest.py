"""`shoal ARGS` against a server that answers as a test tells it."""

from __future__ import annotations

from tests.cli.test_node_commands import served, shoal

__all__ = ["served", "shoal"]
