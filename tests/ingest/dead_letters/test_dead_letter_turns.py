"""Requeues and purges: bounded, in turn by tenant, and whole when their clients leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.rpc.tenant_scope import TenantScope
from services.ingest.dead_letters.dead_letters import CHANGES_AT_ONCE, DeadLetterOutcome, DeadLetters
from services.ingest.dead_letters.filters import DeadLetterSelection
from services.ingest.job import Job
from tests.breakable import PATIENCE_S, until

SELECTED = DeadLetterSelection(("01ARZ3NDEKTSV4RRFFQ69G5FAV",))
Change = Callable[[DeadLetters, TenantScope], Coroutine[Any, Any, DeadLetterOutcome]]


class SlowStore:
    """A store of jobs whose reads of a tenant wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.tenants: list[str] = []
        self.interrupted = 0

    async def read(self, ids: Any, tenant: str | None = None) -> dict[str, Job]:
        if tenant is not None:
            self.tenants.append(tenant)
            try:
                await self.may_end.wait()
            except asyncio.CancelledError:
                self.interrupted += 1
                raise
        return {}


@pytest.mark.parametrize(
    "change",
    [
        lambda letters, scope: letters.requeue(SELECTED, "", scope),
        lambda letters, scope: letters.purge(SELECTED, scope),
    ],
    ids=["requeue", "purge"],
)
async def test_many_changes_of_one_tenant_leave_room_and_are_not_interrupted(change: Change) -> None:
    store = SlowStore()
    jobs, payloads, events = (
        SimpleNamespace(pauses=None),
        SimpleNamespace(drop=lambda ids: asyncio.sleep(0)),
        SimpleNamespace(due_again=lambda jobs: None),
    )
    instance = SimpleNamespace(clock=lambda: None, name="i")
    letters = DeadLetters(cast(Any, store), *cast(Any, (jobs, payloads, events, instance)))

    def changing(tenant: str) -> asyncio.Task[DeadLetterOutcome]:
        return asyncio.create_task(change(letters, TenantScope(tenant)))

    many = [changing("many") for _ in range(200)]
    await until(lambda: len(store.tenants) > 1, "they read")
    other = changing("other")
    await until(lambda: "other" in store.tenants, "the other tenant's is carried out")
    assert store.tenants.count("many") == CHANGES_AT_ONCE // 2
    for task in many:
        task.cancel()
    store.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*many, return_exceptions=True)
        assert list((await other).refused) == list(SELECTED.ids)
    assert all(task.cancelled() for task in many)
    assert (store.interrupted, store.tenants.count("many")) == (0, CHANGES_AT_ONCE // 2)
