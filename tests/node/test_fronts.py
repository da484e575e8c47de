"""Instances of infer come and go under load, and no call of the gateway's is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc

pytestmark = [pytest.mark.node, pytest.mark.timeout(180)]


async def test_no_call_is_lost_while_instances_stop_and_die(node: Callable[..., Any], onnx_models: Path) -> None:
    one = node("--replicas", "infer=2", "--services", "store,infer")
    one.shoal("models", "push", str(onnx_models / "double.onnx"))
    async with grpc.aio.insecure_channel(one.gateway, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await until_both_answer(stub)
        for act in (one.kill, lambda name: one.kill(name, 15)):
            for name in ("infer-0", "infer-1"):
                stop = asyncio.Event()
                callers = [asyncio.create_task(calls_until(stop, stub)) for _ in range(8)]
                await asyncio.sleep(0)
                old = act(name)
                await asyncio.to_thread(one.wait_until_restarted, name, old)
                stop.set()
                assert sum(await asyncio.gather(*callers)) > 0
                await until_both_answer(stub)


def request(value: float) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
    asked = pb.ModelInferRequest(model_name="double", inputs=[tensor])
    asked.raw_input_contents.append(np.full((1, 4), value, np.float32).tobytes())
    return asked


async def calls_until(stop: asyncio.Event, stub: Any) -> int:
    """Calls one after the other, each checked; how many there were. Raises at the first that fails."""
    count = 0
    while not stop.is_set():
        answer = await stub.ModelInfer(request(count), timeout=30)
        assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2.0 * count] * 4
        count += 1
    return count


async def until_both_answer(stub: Any) -> None:
    seen: set[str] = set()
    asked = request(1)
    asked.parameters["explain"].bool_param = True
    async with asyncio.timeout(60):
        while len(seen) < 2:
            with contextlib.suppress(grpc.aio.AioRpcError):
                seen.add((await stub.ModelInfer(asked)).parameters["replica"].string_param)
            await asyncio.sleep(0.01)
