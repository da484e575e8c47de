"""A model of another Shoal, both of them processes of their own: what kills and freezes of the other one do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from mesh.rpc.channel import connect
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, output, request
from tests.infer.remote import configs
from tests.infer.test_infer_process import Infer

PATIENCE_S = 60


@pytest.fixture
async def far(python: str, tmp_path: Path) -> AsyncIterator[Infer]:
    Repository(tmp_path / "far").put("scale", onnx_files.scale())
    with Infer(python, tmp_path / "far.log", repository=str(tmp_path / "far")) as running:
        await running.until_serving()
        yield running


@asynccontextmanager
async def near(python: str, tmp_path: Path, far: Infer) -> AsyncIterator[GRPCInferenceServiceStub]:
    configs.put(tmp_path / "near", "scale", url=f"grpc://{far.address}")
    with Infer(python, tmp_path / "near.log", repository=str(tmp_path / "near")) as running:
        await running.until_serving()
        async with connect(running.address) as channel:
            yield GRPCInferenceServiceStub(channel)


async def ask(stub: GRPCInferenceServiceStub, value: float, timeout_s: float = PATIENCE_S) -> str:
    """OK, when the response is right; else the status."""
    try:
        response = await stub.ModelInfer(request("scale", x=np.full((1, 4), value, np.float32)), timeout=timeout_s)
    except ShoalError as err:
        return err.code.name
    except grpc.RpcError as err:
        return err.code().name
    assert output(response, "y").tolist() == [[2 * value] * 4]
    return "OK"


async def test_a_remote_server_that_is_killed_under_load(python: str, tmp_path: Path, far: Infer):
    async with near(python, tmp_path, far) as stub:
        seen: Counter[str] = Counter()
        is_over = asyncio.Event()

        async def load(n: int) -> None:
            while not is_over.is_set():
                seen[await ask(stub, n)] += 1

        callers = [asyncio.create_task(load(n)) for n in range(16)]
        await until(lambda: seen["OK"] > 200, "responses")
        far.kill()
        await until(lambda: seen["UNAVAILABLE"] > 50, "refusals")
        far.start()
        before = seen["OK"]
        await until(lambda: seen["OK"] > before + 200, "responses again")
        is_over.set()
        await asyncio.gather(*callers)
        assert set(seen) == {"OK", "UNAVAILABLE"}
        assert [await ask(stub, n) for n in range(20)] == ["OK"] * 20


async def test_a_stopped_remote_server_times_out(python: str, tmp_path: Path, far: Infer):
    async with near(python, tmp_path, far) as stub:
        assert await ask(stub, 1) == "OK"
        far.freeze()
        # More than are under way at a time: those that wait behind them are completed in time, too.
        assert set(await asyncio.gather(*(ask(stub, n, 1) for n in range(400)))) == {"DEADLINE_EXCEEDED"}
        far.thaw()
        assert await ask(stub, 2) == "OK"


async def test_explain_and_statistics_count_remote_executions(python: str, tmp_path: Path, far: Infer):
    async with near(python, tmp_path, far) as stub:
        asked = request("scale", x=np.ones((3, 4), np.float32))
        asked.parameters["explain"].bool_param = True
        said = (await stub.ModelInfer(asked, timeout=PATIENCE_S)).parameters
        assert said["batch_size"].int64_param == 3
        assert said["compute_us"].int64_param > 0
        statistics = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="scale"))
        assert statistics.model_stats[0].inference_count == 3
