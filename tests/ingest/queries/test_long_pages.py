"""Pages of dead letters and batches: other work goes on while their messages are made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from mesh.process.pauses import Pauses
from mesh.rpc.tenant_scope import Scopes
from services.ingest.batches import rpc as batches_rpc
from services.ingest.batches.batch import Totals
from services.ingest.batches.batch_control import BatchView
from services.ingest.dead_letters import rpc as letters_rpc
from services.ingest.queries.jobs import Page
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import PATIENCE_S
from tests.ingest.batches.making import START, batch
from tests.ingest.making import job

MANY = 300
SCOPES = Scopes("shoal.ingest.v1.IngestService")
CONTEXT = cast(Any, SimpleNamespace(invocation_metadata=lambda: None))


@pytest.mark.parametrize(("module", "at_once"), [(letters_rpc, 16), (batches_rpc, 2)])
async def test_pages_take_turns_with_other_work(
    module: ModuleType, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    made = module.message_of
    monkeypatch.setattr(module, "message_of", lambda *given: (order.append("m"), made(*given))[1])

    async def page(*given: object) -> Any:
        return (
            Page([job()] * MANY, "") if module is letters_rpc else ([BatchView(batch(tmp_path), Totals())] * MANY, "")
        )

    source = SimpleNamespace(page=page, pauses=Pauses())
    letters = letters_rpc.DeadLettersRpc(cast(Any, source), SCOPES)
    batches = batches_rpc.BatchesRpc(cast(Any, SimpleNamespace(control=source, clock=lambda: START)), SCOPES)

    async def messages() -> int:
        if module is letters_rpc:
            return len((await letters.ListDeadLetters(pb.ListDeadLettersRequest(), CONTEXT)).jobs)
        return len((await batches.ListBatches(pb.ListBatchesRequest(), CONTEXT)).batches)

    async def bystander() -> None:
        while True:
            order.append(" ")
            await asyncio.sleep(0)

    other = asyncio.create_task(bystander())
    async with asyncio.timeout(PATIENCE_S):
        lists = [asyncio.create_task(messages()) for _ in range(3)]
        assert await asyncio.gather(*lists) == [MANY] * 3
    other.cancel()
    # Those of three lists that begin in one iteration.
    assert max(map(len, "".join(order).split())) <= 3 * at_once
