"""`python -m services.infer` on a folder of models: what `shoal serve` runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mesh.process.config import ConfigError, load
from mesh.rpc.channel import connect
from services.infer.config import InferConfig
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

X = floats([1, 2, 3, 4])


class Infer(Process):
    """An infer process on a TCP port of its own."""

    def __init__(self, python: str, log: Path, **env: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        settings = {"SHOAL_INFER_LISTEN": self.address, **{f"SHOAL_INFER_{k.upper()}": v for k, v in env.items()}}
        super().__init__([python, "-m", "services.infer"], log, settings)

    async def until_serving(self) -> None:
        async with connect(self.address) as channel:
            await until(lambda: serves(channel), "infer serving")

    def logged(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


async def serves(channel: grpc.aio.Channel) -> bool:
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    except grpc.aio.AioRpcError:
        return False
    return response.status == health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def serving(infer: Infer):
    with infer:
        await infer.until_serving()
        async with connect(infer.address) as channel:
            yield inference_pb2_grpc.GRPCInferenceServiceStub(channel), channel


@pytest.fixture
def infer(python: str, models_folder: Repository, tmp_path: Path) -> Infer:
    models_folder.bare("double", onnx_files.scale())
    models_folder.bare("slow", onnx_files.slow(400))
    models_folder.put("broken", b"nothing")
    return Infer(python, tmp_path / "infer.log", repository=str(models_folder.root))


async def test_it_serves_a_folder_and_stops_in_order(infer):
    async with serving(infer) as (stub, channel):
        np.testing.assert_array_equal(output(await stub.ModelInfer(request("double", x=X)), "y"), 2 * X)
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        names = [s.name async for response in call for s in response.list_services_response.service]
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(names)
        # A call in flight at the stop is completed.
        calls = [asyncio.ensure_future(stub.ModelInfer(request("slow", x=X))) for _ in range(4)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert await asyncio.to_thread(infer.terminate) == 0
        for call in calls:
            assert (await call).outputs
    lines = infer.logged()  # Nothing but JSON.
    assert any("model broken version 1 is unavailable" in line["message"] for line in lines)
    assert not [line for line in lines if line["level"] == "ERROR"]


async def test_a_run_that_needs_more_memory_than_the_process_may_have_fails_alone(python, models_folder, tmp_path):
    models_folder.bare("double", onnx_files.scale())
    models_folder.bare("expanding", onnx_files.expanding())
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), memory_bytes=str(2 << 30))
    async with serving(infer) as (stub, _):

        async def zeros(count: int) -> int:
            return output(await stub.ModelInfer(request("expanding", count=np.array([count]))), "y").size

        assert await zeros(1000) == 1000
        for count in (2 << 30, 1 << 40):
            with pytest.raises(grpc.aio.AioRpcError, match=r"Failed to allocate memory|Available memory") as err:
                await zeros(count)
            assert err.value.code() is grpc.StatusCode.INTERNAL
            assert await zeros(1000) == 1000
            np.testing.assert_array_equal(output(await stub.ModelInfer(request("double", x=X)), "y"), 2 * X)
        assert infer.is_running()


async def test_runs_leave_memory_to_the_rest_of_the_process(python, models_folder, tmp_path):
    models_folder.bare("double", onnx_files.scale())
    names = [f"pairs{n}" for n in range(4)]
    for name in names:
        models_folder.put(name, onnx_files.pairs(), config="max_batch_size: 0")
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), memory_bytes=str(1 << 30))
    async with serving(infer) as (stub, _):
        failed = 0
        for count in range(16_000, 1_000, -1_000):
            for name in names:
                call = stub.ModelInfer(request(name, x=np.ones((1, count), np.float32)))
                if await call.code() is not grpc.StatusCode.OK:
                    assert re.search(r"Failed to allocate memory|Available memory|bad_alloc", await call.details())
                    failed += 1
            # Native code copies it, and crashes without memory.
            large = request("double", id="i" * 3_000_000, x=X)
            assert (await stub.ModelInfer(large)).id == large.id
        assert failed
        # The parts of the arena that larger runs have left are not missing to others.
        for name in names:
            await stub.ModelInfer(request(name, x=np.ones((1, 7_000), np.float32)))
        assert infer.is_running()


async def test_hostile_bytes_end_nothing(infer):
    async with serving(infer) as (stub, channel):
        rng = np.random.default_rng(5)
        for path in ("ModelInfer", "ModelConfig", "RepositoryModelLoad", "ModelStatistics"):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{path}")
            for size in (1, 7, 100, 10_000):
                with pytest.raises(grpc.aio.AioRpcError) as err:
                    await call(b"\xff" + rng.bytes(size))
                assert err.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        names = "n" * 10_000_000
        for asked in (
            pb.ModelInferRequest(model_name=names),
            pb.ModelInferRequest(model_name="double", model_version=names),
            pb.ModelInferRequest(model_name="double", inputs=[pb.ModelInferRequest.InferInputTensor(name=names)]),
            pb.ModelInferRequest(
                model_name="double",
                inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[2**62] * 1_000_000)],
            ),
            pb.ModelInferRequest(
                model_name="double",
                inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])] * 500_000,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as err:
                await stub.ModelInfer(asked)
            assert err.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            assert len(err.value.details()) < 2000
        too_large = request("double", x=np.zeros((1, 4), "f4"))
        too_large.raw_input_contents[0] = bytes(100 << 20)
        with pytest.raises(grpc.aio.AioRpcError) as err:
            await stub.ModelInfer(too_large)
        assert "got 104857600" in err.value.details()
        assert (await stub.ModelInfer(request("double", x=X))).outputs
        assert infer.is_running()


async def test_a_deadline_that_passes_is_no_fault_of_the_others(infer):
    async with serving(infer) as (stub, _):
        calls = [stub.ModelInfer(request("slow", x=X), timeout=0.001 if n % 2 else 60) for n in range(40)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for n, outcome in enumerate(outcomes):
            if n % 2:
                assert isinstance(outcome, grpc.aio.AioRpcError)
                assert outcome.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                np.testing.assert_array_equal(output(outcome, "y"), 2 * X)
        stats = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="slow"))).model_stats[0]
        # Those whose time was over before they began were not run: at most the ones that slipped in.
        assert stats.inference_count < 40


def test_a_repository_that_is_not_there_ends_the_start_with_2(python):
    done = subprocess.run(
        [python, "-m", "services.infer"],
        env={**os.environ, "SHOAL_INFER_LISTEN": "127.0.0.1:0", "SHOAL_INFER_REPOSITORY": "/no/such/folder"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "/no/such/folder is not a folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({}, "set one of SHOAL_INFER_CACHE_DIR"),
        ({"CACHE_DIR": "/tmp/x", "REPOSITORY": "/tmp"}, "set one of SHOAL_INFER_CACHE_DIR"),
        ({"CACHE_DIR": "/tmp/x"}, "needs SHOAL_INFER_MESH"),
        ({"REPOSITORY": "/tmp", "THREADS": "-1"}, "SHOAL_INFER_THREADS='-1'"),
        ({"REPO": "/tmp"}, "SHOAL_INFER_REPO is not a setting"),
    ],
)
def test_a_wrong_setting_is_named(env, text):
    given = {f"SHOAL_INFER_{key}": value for key, value in env.items()}
    with pytest.raises(ConfigError) as err:
        load(InferConfig, "infer", {"SHOAL_INFER_LISTEN": "127.0.0.1:0", **given})
    assert text in str(err.value)


async def test_the_folder_of_one_model_and_a_single_file(python, models_folder, tmp_path):
    folder = models_folder.put("m", onnx_files.scale())
    models_folder.bare("single", onnx_files.scale())
    refused = Infer(python, tmp_path / "one.log", repository=str(folder))
    with refused:
        await until(lambda: not refused.is_running())
    assert "give the folder that it lies in" in refused.log.read_text()
    infer = Infer(python, tmp_path / "file.log", repository=str(models_folder.root / "single.onnx"))
    async with serving(infer) as (stub, _):
        assert (await stub.ModelInfer(request("single", x=X))).outputs
