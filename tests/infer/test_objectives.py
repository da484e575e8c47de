"""Objectives of the policy in infer: requests count by them from the moment at which the policy is in force."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mesh.metrics.page_client import fetch
from mesh.rpc.access import Access
from services.infer import metrics
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources.repository import scan
from shoal.access import tokens
from shoal.access.tokens import Signer
from tests.access.policies import policy
from tests.breakable import Process, until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving, floats, request, serving

X = floats([1, 2, 3, 4])
GOAL = 'parameters { key: "slo_ms" value { string_value: "30000" } }'
# No request takes so little, or so long.
NEVER_MS, ALWAYS_MS = 1e-6, 3_600_000


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


def readings(served: Serving, model: str) -> dict[str, Any]:
    """Return the latency goal, both shares, and the successful requests within the goal and without."""
    families = {
        metrics.SLO: "goal",
        metrics.SLO_LATENCY: "latency",
        metrics.SLO_AVAILABILITY: "availability",
        metrics.WITHIN_SLO: "within",
        metrics.REQUESTS: "success",
    }
    return {
        families[family]: value
        for family, labels, value in metrics.source(served.models)()
        if family in families and labels[0] == model and labels[-1] != "failure"
    }


async def test_requests_count_by_the_objectives_of_the_policy_in_force(
    signer: Signer, models_folder: Repository, run_dir: Path
) -> None:
    models_folder.bare("plain", onnx_files.scale(2))
    models_folder.put("goal", onnx_files.scale(2), config=GOAL)

    def stating(*objectives: dict[str, Any]) -> Any:
        return policy(signer, objectives=[{"name": f"o{n}", **each} for n, each in enumerate(objectives)])

    access = Access(None)
    async with serving(models_folder.root, run_dir / "infer.sock", QueueLimits()) as served:

        async def call() -> None:
            for model in ("plain", "goal"):
                await served.stub.ModelInfer(request(model, x=X))

        access.follow_policy(lambda policy: served.models.set_objectives(policy.objectives))
        await call()
        assert readings(served, "plain") == {"availability": 0.999, "within": 1, "success": 1}
        own = {"goal": 30.0, "latency": 0.99, "availability": 0.999}
        assert readings(served, "goal") == {**own, "within": 1, "success": 1}
        # The policy's goal is in place of the model's own.
        access.set_policy(stating({"latency_ms": NEVER_MS, "latency_percent": 95, "availability_percent": 99.5}))
        await call()
        stated = {"goal": NEVER_MS / 1000, "latency": 0.95, "availability": 0.995, "within": 1, "success": 2}
        assert readings(served, "plain") == readings(served, "goal") == stated
        # A version that is loaded later counts by it, too.
        models_folder.bare("later", onnx_files.scale(2))
        assert served.core._control is not None
        served.core._control.offer(scan(models_folder.root))
        await served.models.settled()
        assert readings(served, "later") == {**stated, "within": 0, "success": 0}
        access.set_policy(stating({"models": ["plain"], "latency_ms": ALWAYS_MS}))
        await call()
        assert readings(served, "plain") == {**own, "goal": ALWAYS_MS / 1000, "within": 2, "success": 3}
        assert readings(served, "goal") == {**own, "within": 2, "success": 3}
        # Without an objective, a model without a goal has none again.
        access.set_policy(stating())
        assert served.models.find("plain", "").statistics.slo_s == math.inf


async def test_a_process_publishes_the_objectives_of_its_policy_file(
    signer: Signer, models_folder: Repository, run_dir: Path, python: str
) -> None:
    models_folder.bare("plain", onnx_files.scale(2))
    path, page = run_dir / "policy.json", f"unix:{run_dir}/metrics.sock"
    settings = {
        "LISTEN": f"unix:{run_dir}/infer.sock",
        "POLICY": path,
        "METRICS": page,
        "REPOSITORY": models_folder.root,
    }
    seen: list[str] = []

    async def has(expected: str) -> bool:
        try:
            found = await fetch(page, "/metrics?name[]=shoal_infer_slo_*", timeout_s=30, most_bytes=1 << 20)
        # The process starts, or is not loaded yet.
        except OSError:
            return False
        seen[:] = [line for line in found.body.decode().splitlines() if not line.startswith("#")]
        return f"shoal_infer_slo_{expected}" in seen

    def state(*objectives: dict[str, Any]) -> None:
        (run_dir / "written").write_text(policy(signer, objectives=[*objectives]).model_dump_json())
        (run_dir / "written").replace(path)

    state({"name": "all", "availability_percent": 99.5})
    with Process(
        [python, "-m", "services.infer"],
        run_dir / "infer.log",
        {f"SHOAL_INFER_{name}": str(value) for name, value in settings.items()},
    ):
        labels = 'model="plain",version="1"'
        await until(partial(has, f"availability_ratio{{{labels}}} 0.995"), "the objective", 60)
        assert len(seen) == 1
        state({"name": "plain", "models": ["plain"], "latency_ms": 20, "latency_percent": 90})
        await until(partial(has, f"seconds{{{labels}}} 0.02"), "the new objective", 60)
        assert {*seen} == {
            f"shoal_infer_slo_seconds{{{labels}}} 0.02",
            f"shoal_infer_slo_latency_ratio{{{labels}}} 0.9",
            f"shoal_infer_slo_availability_ratio{{{labels}}} 0.999",
        }
