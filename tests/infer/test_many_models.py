"""Statistics and index of many models, and statistics of many sizes of batches, leave the event loop to other calls."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from mesh.rpc.heavy_work import HeavyWork
from services.infer.scheduling.statistics import BatchTimes, Statistics
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.tensors import completed
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving
from tests.mesh.http1.raw import RawClient

MODELS = 40


@pytest.fixture
async def many(serve: Any, models_folder: Repository) -> Serving:
    for n in range(MODELS):
        models_folder.bare(f"m{n:02d}", onnx_files.scale(2))
    serving: Serving = await serve(models_folder.root)
    return serving


def count_turns(heavy: HeavyWork, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Let each step take a whole turn, and return a list that grows with each turn."""
    turns: list[None] = []
    seconds, turn = itertools.count(), heavy._turn
    monkeypatch.setattr(heavy, "_clock", lambda: next(seconds) / 100)
    monkeypatch.setattr(heavy, "_turn", lambda steps: (turns.append(None), turn(steps))[1])
    return turns


async def test_statistics_of_many_models_take_a_turn_each(many: Serving, monkeypatch: pytest.MonkeyPatch):
    turns = count_turns(many.core.heavy, monkeypatch)
    response = await many.stub.ModelStatistics(pb.ModelStatisticsRequest())
    assert [stats.name for stats in response.model_stats] == [f"m{n:02d}" for n in range(MODELS)]
    assert len(turns) >= MODELS


async def test_statistics_of_many_models_over_rest_take_a_turn_each(many: Serving, monkeypatch: pytest.MonkeyPatch):
    assert many.server is not None
    turns = count_turns(many.core.heavy, monkeypatch)
    async with await RawClient.connect(many.server.address) as client:
        response = await client.request("GET", "/v2/models/stats", b"")
    assert [stats["name"] for stats in json.loads(response.body)["model_stats"]] == [f"m{n:02d}" for n in range(MODELS)]
    # Twice: the messages, and their JSON.
    assert len(turns) >= 2 * MODELS


async def test_the_index_of_many_models_takes_a_turn_each(many: Serving, monkeypatch: pytest.MonkeyPatch):
    assert many.server is not None
    names = [f"m{n:02d}" for n in range(MODELS)]
    turns = count_turns(many.core.heavy, monkeypatch)
    response = await many.stub.RepositoryIndex(pb.RepositoryIndexRequest())
    assert [row.name for row in response.models] == names
    assert len(turns) >= MODELS
    async with await RawClient.connect(many.server.address) as client:
        answer = await client.request("POST", "/v2/repository/index", b"")
    assert [(row["name"], row["state"]) for row in json.loads(answer.body)] == [(name, "READY") for name in names]
    assert len(turns) >= 3 * MODELS


def test_statistics_of_many_sizes_of_batches_are_made_in_steps():
    statistics = Statistics(by_rows={rows: BatchTimes(count=1) for rows in range(1, 10_001)})
    assert sum(1 for _ in statistics.message("m", 1)) > 100
    assert [size.batch_size for size in completed(statistics.message("m", 1)).batch_stats] == list(range(1, 10_001))
