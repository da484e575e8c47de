"""The infer replicas of one node share what asks for it, as the workers of `shoal serve` do."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.infer import onnx_files
from tests.infer.model_process.test_model_process import is_alive
from tests.node.test_shared_models import owners, put, wait_until

pytestmark = [pytest.mark.node, pytest.mark.timeout(180)]


def test_two_replicas_have_one_process_for_a_shared_model(node: Any, tmp_path: Any) -> None:
    running = node("--replicas", "infer=2", "--services", "store,infer")
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
