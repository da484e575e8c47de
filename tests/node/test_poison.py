"""A request that kills the instance that runs it: the next one is spared, and everybody else is served."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.node.conftest import python_model

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

MODEL = """
import os

class Model:
    inputs = {"x": ("FP32", [-1, 4])}
    outputs = {"y": ("FP32", [-1, 4])}

    def predict(self, batch):
        x = batch["x"]
        if (x == 666).any():
            os._exit(7)
        if (x == 667).any():
            os.abort()
        return {"y": 2 * x}
"""


@pytest.fixture(scope="module")
def running(node: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A node with three instances of a model that shares their process."""
    folder = python_model(tmp_path_factory.mktemp("models") / "fragile", MODEL)
    one = node("--replicas", "infer=3")
    one.shoal("models", "push", str(folder))
    return one


def request(value: float) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
    asked = pb.ModelInferRequest(model_name="fragile", inputs=[tensor])
    asked.raw_input_contents.append(np.full((1, 4), value, np.float32).tobytes())
    return asked


async def until_three_are_ready(stub: Any, running: Any) -> dict[str, int]:
    """The pids of the instances, once each has answered."""
    seen: set[str] = set()
    async with asyncio.timeout(120):
        while len(seen) < 3:
            asked = request(1)
            asked.parameters["explain"].bool_param = True
            try:
                answer = await stub.ModelInfer(asked)
                seen.add(answer.parameters["replica"].string_param)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
    return {name: pid for name, pid in running.pids().items() if name.startswith("infer-")}


@pytest.mark.parametrize("value", [666.0, 667.0])
async def test_it_kills_one_instance_and_no_second(running: Any, value: float) -> None:
    async with grpc.aio.insecure_channel(running.gateway, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        before = await until_three_are_ready(stub, running)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(request(value), timeout=60)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "the instance that ran this request died" in (caught.value.details() or "")
        for number in range(50):  # The others never stopped.
            answer = await stub.ModelInfer(request(number), timeout=30)
            assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2 * number] * 4
        after = await until_three_are_ready(stub, running)
    assert len(set(before.values()) & set(after.values())) == 2, "two of three were spared"


async def test_kill_9_is_held_against_no_request(running: Any) -> None:
    async with grpc.aio.insecure_channel(running.gateway, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await until_three_are_ready(stub, running)
        calls = [asyncio.ensure_future(stub.ModelInfer(request(n), timeout=60)) for n in range(300)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        running.kill("infer-1")
        for number, answer in enumerate(await asyncio.gather(*calls)):
            assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2 * number] * 4
