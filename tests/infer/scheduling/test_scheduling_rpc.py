"""Scheduling as clients and operators see it: what config.pbtxt says, what a request says, and what is counted."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request

ROW = floats([1, 2, 3, 4])

SIGNATURE = """
max_batch_size: 8
"""


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


LEVELS = """
dynamic_batching {
  priority_levels: 3 default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 10000000 allow_timeout_override: true max_queue_size: 500 }
  priority_queue_policy { key: 3 value { timeout_action: DELAY default_timeout_microseconds: 1000 } }
}"""


@pytest.fixture
async def served(serve, models_folder):
    put = models_folder.put
    put("plain", onnx_files.scale())
    put("levels", onnx_files.scale(), config=SIGNATURE + LEVELS)
    put("ordered", onnx_files.scale(), config=SIGNATURE + "dynamic_batching { preserve_ordering: true }")
    put("goal", onnx_files.scale(), config=SIGNATURE + parameter("slo_ms", "50"))
    put("tenants", onnx_files.scale(), config=SIGNATURE + parameter("tenant_weights", "gold=4,free=1"))
    put("hasty", onnx_files.scale(), config=SIGNATURE + parameter("slo_ms", "soon"))
    return await serve(models_folder.root)


@pytest.mark.parametrize("model", ["plain", "levels", "ordered", "goal", "tenants"])
@pytest.mark.parametrize("priority", [0, 1, 3, 2**64 - 1])
async def test_many_requests_get_their_own_results(served, model, priority):
    async def one(n: int) -> None:
        asked = request(model, x=floats([n, n, n, n]), id=str(n))
        if priority:
            asked.parameters["priority"].uint64_param = priority
        metadata = (("x-shoal-tenant", ["gold", "free", "other"][n % 3]),)
        while True:
            try:
                response = await served.stub.ModelInfer(asked, timeout=30, metadata=metadata)
                break
            except grpc.aio.AioRpcError as err:
                # On a busy machine the backlog may be too long for the goal.
                if model != "goal" or err.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                await asyncio.sleep(0.05)
        np.testing.assert_array_equal(output(response, "y"), floats([2 * n] * 4))
        assert response.id == str(n)

    await asyncio.gather(*(one(n) for n in range(100)))


async def test_configuration_errors_are_named_in_the_index(served):
    index = await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())
    (row,) = [row for row in index.models if row.name == "hasty"]
    assert row.state == "UNAVAILABLE"
    assert "parameter slo_ms 'soon': expected milliseconds" in row.reason


async def test_a_timeout_of_the_request_counts_although_the_model_has_none(served):
    version = served.models.find("plain", "")
    async with occupied(version):
        asked = request("plain", x=ROW)
        asked.parameters["timeout"].int64_param = 1000
        with pytest.raises(grpc.aio.AioRpcError) as err:
            await served.stub.ModelInfer(asked)
        assert err.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "Request timeout expired" in (err.value.details() or "")
    (stats,) = (await served.stub.ModelStatistics(pb.ModelStatisticsRequest(name="plain"))).model_stats
    assert (stats.scheduling.expired, stats.scheduling.expired_executed) == (1, 0)
    assert stats.inference_stats.fail.count == 1


async def test_a_caller_that_leaves_the_queue_is_counted_and_not_run(served):
    version = served.models.find("plain", "")
    runs = version.statistics.executions
    async with occupied(version):
        call = served.stub.ModelInfer(request("plain", x=ROW))
        await until_waiting(version)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(30):
            while not version.statistics.cancelled:
                await asyncio.sleep(0.005)
    assert version.statistics.executions == runs
    (stats,) = (await served.stub.ModelStatistics(pb.ModelStatisticsRequest(name="plain"))).model_stats
    assert stats.scheduling.cancelled == 1


async def until_waiting(version) -> None:
    async with asyncio.timeout(30):
        while not len(version.scheduler._queue):
            await asyncio.sleep(0.005)


class occupied:
    """While the block lasts, all instances of a version are taken."""

    def __init__(self, version) -> None:
        self.scheduler = version.scheduler

    async def __aenter__(self) -> None:
        self.idle, self.scheduler._idle = self.scheduler._idle, []

    async def __aexit__(self, *_: object) -> None:
        self.scheduler._idle = self.idle
        self.scheduler._dispatch_soon()
