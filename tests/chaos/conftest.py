"""Nodes for the chaos runs: those of tests/node."""

from __future__ import annotations

from tests.node.conftest import node

__all__ = ["node"]
