"""Output of `shoal status` for a node with models on the slow path, and without."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shoal.cli import output, status
from shoal.client.status import Instance, InstanceState, Status


def instance(number: int, slow_paths: dict[str, str]) -> Instance:
    return Instance(
        service="infer",
        name=f"local/infer-{number}",
        node="local",
        address="unix:/run/infer.sock",
        pid=1,
        state=InstanceState.READY,
        started_at=None,
        models={"double": (1,), "cached": (2,)},
        version="0.1.0",
        drained_by_operator=False,
        slow_paths=slow_paths,
    )


def printed(monkeypatch: pytest.MonkeyPatch, *instances: Instance) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    monkeypatch.setattr(output, "console", lambda **options: console)
    monkeypatch.setattr(status, "console", lambda **options: console)
    status._show(Status("127.0.0.1:8080", instances, False, None, (), (), ()), [], [], {})
    return screen.getvalue()


def test_models_on_the_slow_path_are_named_once_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"cached": "it has a response cache"}
    text = printed(monkeypatch, instance(0, slow), instance(1, slow))
    assert text.count("it has a response cache") == 1
    assert "models on the slow path" in text


def test_without_such_models_no_table_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "slow path" not in printed(monkeypatch, instance(0, {}))
