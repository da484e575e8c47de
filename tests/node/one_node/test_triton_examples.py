"""Triton's own HTTP examples, as they are, through the gateway of a node with two replicas."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import triton_examples
from tests.node.conftest import Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(120)]


def test_they_run(running: Node, tmp_path: Path, repository_root: Path) -> None:
    triton_examples.put_models(tmp_path)
    for model in triton_examples.MODELS:
        running.shoal("models", "push", str(tmp_path / model))
    python = repository_root / ".venv-tritonclient/bin/python"
    assert triton_examples.failed(python, running.gateway) == {}
