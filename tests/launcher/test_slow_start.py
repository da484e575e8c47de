"""A start that takes long says what it waits for, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.process.tasks import end
from shoal.access.rpc_groups import CREATE_KEY
from shoal.cli.screen import NodeScreen
from shoal.errors import FailedPrecondition, ShoalError, Unavailable
from shoal.node import admin_key, gateway, node
from shoal.node.admin_key import AdminKey
from shoal.node.options import checked
from shoal.node.plan import Layout
from shoal.node.ready import ReadyFiles
from tests.breakable import until

WHY = "the cluster has no signer yet: policy.json, the copy of the last policy, cannot be read"


class Screen(NodeScreen):
    """Screen that keeps what a slow start says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(checked(data_dir=folder), as_json=False)
        self.said: list[str] = []

    def _say(self, text: str, style: str = "") -> None:
        self.said.append(text)


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return Screen(tmp_path)


@pytest.fixture
def running(tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(node, "_SLOW_START_S", 0.01)
    monkeypatch.setattr(node, "_POLL_S", 0.01)
    monkeypatch.setattr(gateway, "probes", lambda *args, **options: {})
    layout = Layout(run_dir=tmp_path, gateway_port=1, admin_port=2)
    made: Any = node._Running(checked(data_dir=tmp_path), layout, ReadyFiles([]), screen, None)
    made.supervisor = SimpleNamespace(keepers=[])
    made.admin_key = AdminKey(tmp_path / "admin.key", [])
    return made


def refuses(monkeypatch: pytest.MonkeyPatch, *errors: ShoalError) -> list[str]:
    """Let coord refuse keys, each time with the next error, and the last one again and again."""
    asked: list[str] = []

    async def call(sockets: Sequence[Path], rpc: str, request: Any, response: Any) -> Any:
        asked.append(rpc)
        raise errors[min(len(asked), len(errors)) - 1]

    monkeypatch.setattr(admin_key, "call_as_launcher", call)
    return asked


async def test_a_start_without_a_key_for_the_nodes_user_says_why(
    running: Any, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuses(monkeypatch, Unavailable(WHY))
    starting = asyncio.create_task(running.until_ready(0.0))
    try:
        await until(lambda: any(WHY in text for text in screen.said), "the reason is said")
    finally:
        await end(starting)
    (text, *_) = [text for text in screen.said if WHY in text]
    assert text.startswith("still waiting for a key for the node's user after ")
    assert f"({WHY}); logs: " in text
    assert set(asked) == {CREATE_KEY}


async def test_a_start_ends_when_coord_can_never_make_a_key(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses(monkeypatch, Unavailable(WHY), FailedPrecondition("another master key"))
    with pytest.raises(FailedPrecondition, match="another master key"):
        await running.until_ready(0.0)
