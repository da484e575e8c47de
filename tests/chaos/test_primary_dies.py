"""MongoDB as three members: the primary is killed under load, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.breakable import until
from tests.chaos.replica_set import ReplicaSet
from tests.chaos.workload import Workload, are_ended, compared
from tests.long_form import by_form

pytestmark = [pytest.mark.node, pytest.mark.timeout(400)]

KILLS = by_form(1, 2)


async def test_the_primary_dies_and_nothing_acknowledged_is_lost(node: Any, onnx_models: Path, tmp_path: Path) -> None:
    with ReplicaSet(tmp_path) as mongo:
        await mongo.until_ready()
        one = await asyncio.to_thread(node, "--mongo", mongo.uri)
        await asyncio.to_thread(one.shoal, "models", "push", str(onnx_models / "double.onnx"))
        workload = Workload(one.gateway, ("double",))
        async with workload.running():
            await more_are_acknowledged(workload, 100)
            for _ in range(KILLS):
                primary = await mongo.until_primary()
                mongo.kill(primary)
                await mongo.until_primary(other_than=primary)
                await more_are_acknowledged(workload, 100)
                mongo.bring_back(primary)
                await mongo.until_whole()
        await until(lambda: are_ended(one.gateway), "every job ends", 120, every_s=0.5)
        verdict = await compared(one.gateway, workload.ledger)
        assert verdict.is_clean, str(verdict)
        one.close()  # Before its database goes.


async def more_are_acknowledged(workload: Workload, jobs: int) -> None:
    """Waits for so many further acknowledgements."""
    goal = len(workload.ledger.numbers) + jobs
    await until(lambda: len(workload.ledger.numbers) >= goal, f"{jobs} further jobs are acknowledged", 60)
