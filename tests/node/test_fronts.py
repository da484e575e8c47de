"""Two infer replicas of a node: no call is lost while they come and go, and they share what asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.infer import onnx_files
from tests.infer.model_process.test_model_process import is_alive
from tests.node.conftest import Node, NodeFactory
from tests.node.test_shared_models import owners, put, wait_until

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def running(node: NodeFactory) -> Node:
    return node("--replicas", "infer=2", "--services", "store,infer")


async def test_no_call_is_lost_while_instances_stop_and_die(running: Node, onnx_models: Path) -> None:
    running.shoal("models", "push", str(onnx_models / "double.onnx"))
    async with grpc.aio.insecure_channel(running.gateway, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await until_both_answer(stub)
        for act in (running.kill, lambda name: running.kill(name, signal.SIGTERM)):
            for name in ("infer-0", "infer-1"):
                stop = asyncio.Event()
                callers = [asyncio.create_task(calls_until(stop, stub)) for _ in range(8)]
                await asyncio.sleep(0)
                old = act(name)
                await asyncio.to_thread(running.wait_until_restarted, name, old)
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
    async with asyncio.timeout(120):
        while len(seen) < 2:
            with contextlib.suppress(grpc.aio.AioRpcError):
                seen.add((await stub.ModelInfer(asked)).parameters["replica"].string_param)
            await asyncio.sleep(0.01)


def test_two_replicas_have_one_process_for_a_shared_model_and_it_ends_with_the_node(
    running: Node, tmp_path: Path
) -> None:
    put(tmp_path / "models", "light", onnx_files.scale().SerializeToString())
    running.shoal("models", "push", str(tmp_path / "models" / "light"))
    x = np.array([[1, 2, 3, 4]], np.float32)
    request = pb.ModelInferRequest(model_name="light", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.parameters["explain"].bool_param = True
    seen: set[str] = set()
    with grpc.insecure_channel(running.gateway, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

        def both_have_answered() -> bool:
            try:
                answer = stub.ModelInfer(request, timeout=30)
            except grpc.RpcError:  # The model is on its way there.
                return False
            assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2, 4, 6, 8]
            seen.add(answer.parameters["replica"].string_param)
            return len(seen) == 2

        wait_until(both_have_answered)
    (owner,) = owners(running.process.pid)
    assert running.stop() == 0
    wait_until(lambda: not is_alive(owner))
