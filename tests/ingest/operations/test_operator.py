"""The operator's turns: an operation that fails delays no other one."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from services.ingest.job import State
from services.ingest.operations.operation import Action, Operation, Selection
from services.ingest.operations.operator import Operator
from services.ingest.queries.filters import JobFilter
from shoal.errors import PermissionDenied

NOW = datetime(2026, 11, 28, tzinfo=UTC)


def operation(name: str) -> Operation:
    chosen = Selection(JobFilter(states=frozenset({State.QUEUED})))
    return Operation(name, "acme", Action.CANCEL, chosen, "", b"", started_at=NOW, updated_at=NOW)


async def test_an_operation_that_fails_waits_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    running = [operation("bad"), operation("good")]
    pages: list[str] = []

    async def all_running() -> list[Operation]:
        return running

    async def page(self: Operator, one: Operation) -> None:
        pages.append(one.id)
        if one.id == "bad":
            raise PermissionDenied("the caller has no grant any more")

    monkeypatch.setattr(Operator, "_page", page)
    repository: Any = SimpleNamespace(running=all_running)
    nothing: Any = None
    operator = Operator(repository, nothing, nothing, nothing, None, leads=lambda: True, ready=asyncio.Event())
    rests = [await operator._run_round() for _ in range(3)]
    assert pages == ["bad", "good", "good", "good"]
    assert rests == [0.0, 0.0, 0.0]
    running.pop()
    assert await operator._run_round() > 0
