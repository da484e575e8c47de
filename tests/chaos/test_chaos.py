"""The chaos run: `kill -9` at random under a steady stream of jobs, then the ledger.

30 s in `make test`; 90 s in `make test-long`, in which each part dies at least once; longer on demand:
`make chaos MINUTES=30`. SHOAL_CHAOS_SEED repeats a storm.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from mesh.process.tasks import end
from tests.breakable import until
from tests.chaos.storm import Storm
from tests.chaos.workload import Workload, are_ended, compared
from tests.long_form import by_form

MINUTES = float(os.environ.get("SHOAL_CHAOS_MINUTES", by_form("0.5", "1.5")))
SEED = int(os.environ.get("SHOAL_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
RECOVERY_S = 240.0
SAYS_EVERY_S = 15.0

pytestmark = [pytest.mark.node, pytest.mark.timeout(MINUTES * 60 + 2 * RECOVERY_S + 120)]

VICTIMS = ("ingest-0", "ingest-1", "infer-0", "infer-1", "store-0", "store-1", "mongod", "etcd", "envoy", "coord-0")
LEAST_VICTIMS = 5 if MINUTES < 1.5 else len(VICTIMS)
"""Parts that die at least once. A storm of 30 s makes 10 kills on average, and kills nobody twice before the others."""


async def test_whatever_dies_every_acknowledged_job_has_its_one_result(node: Any, onnx_models: Path) -> None:
    one = node("--replicas", "infer=2,ingest=2,store=2,coord=2")
    for model in ("double", "slow"):
        one.shoal("models", "push", str(onnx_models / f"{model}.onnx"))
    print(f"\nSHOAL_CHAOS_SEED={SEED}, {MINUTES:g} minutes")
    storm = Storm(lambda: [name for name in VICTIMS if name in one.pids()], one.kill, SEED)
    workload = Workload(one.gateway, ("double", "slow"))
    async with workload.running():
        reporter = asyncio.create_task(say(workload, storm))
        await storm.blow(MINUTES * 60, LEAST_VICTIMS)
        await end(reporter)
    acknowledged = len(workload.ledger.numbers)
    print(f"the storm is over: {storm.kills.total()} kills, {acknowledged} acknowledged; waiting for the rest to end")
    await until(lambda: are_ended(one.gateway), f"every job ends (seed {SEED})", RECOVERY_S, every_s=0.5)
    verdict = await compared(one.gateway, workload.ledger)
    print(f"killed: {dict(sorted(storm.kills.items()))}\nrefused: {dict(workload.ledger.refusals)}\n{verdict}")
    assert verdict.is_clean, f"seed {SEED}: {verdict}"
    assert len(workload.ledger.by_tenant) == 3
    assert acknowledged >= MINUTES * 200, f"so few jobs show little: {workload.ledger}"
    assert storm.kills.total() >= MINUTES * 5


async def say(workload: Workload, storm: Storm) -> None:
    """A line now and then, for who watches."""
    while True:
        await asyncio.sleep(SAYS_EVERY_S)
        print(f"  {storm.kills.total()} kills, {len(workload.ledger.numbers)} jobs acknowledged", flush=True)
