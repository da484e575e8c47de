"""Stateful Python models: they see controls and ids, stay in one process, and lose their sequences with it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import grpc
import pytest

from services.infer.scheduling.queue import QueueLimits
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer.conftest import output
from tests.infer.model_process.python.conftest import PythonRepository, serving
from tests.infer.sequences.stateful_models import config, put, step

START_IT = "must specify the START flag on the first request of the sequence"

REMEMBERS = """
    import os
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            self.sums = {}

        def execute(self, requests):
            return [self.respond(request) for request in requests]

        def respond(self, request):
            def given(name):
                return pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0]
            x, id = given("x"), request.correlation_id()
            if x == 666:
                os.abort()
            if x < 0:
                error = pb_utils.TritonError("below zero", pb_utils.TritonError.NOT_FOUND)
                return pb_utils.InferenceResponse(error=error)
            if request.flags() & 1:
                self.sums[id] = 0
            self.sums[id] += x
            told = [self.sums[id], os.getpid(), given("START"), request.flags()]
            return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([told], np.float64))])
"""

CONFIG = """
backend: "python"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_FP64 dims: 4 }
instance_group { count: %d kind: KIND_CPU }
%s
sequence_batching {
  oldest { max_candidate_sequences: 8 }
  max_sequence_idle_microseconds: 600000000
  control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
}
"""

OWN = """
    import numpy as np
    class Model:
        inputs = {"x": ("FP32", [-1, 1]), "START": ("BOOL", [-1]), "ID": ("BYTES", [-1, 1]), "sum_in": ("FP32", [-1])}
        outputs = {"y": ("FP32", [-1]), "id": ("BYTES", [-1, 1]), "sum_out": ("FP32", [-1])}
        def predict(self, batch):
            sums = batch["sum_in"] + batch["x"][:, 0]
            return {"y": sums, "sum_out": sums, "id": batch["ID"]}
"""

OWN_CONFIG = """
backend: "python"
max_batch_size: 4
sequence_batching {
  direct { }
  control_input { name: "START" control { kind: CONTROL_SEQUENCE_START bool_false_true: [false, true] } }
  control_input { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
  state { input_name: "sum_in" output_name: "sum_out" data_type: TYPE_FP32 dims: [] }
}
"""


@pytest.fixture
def repo(tmp_path) -> PythonRepository:
    return PythonRepository(tmp_path / "models")


@pytest.fixture
async def serve(repo, tmp_path_factory):
    socket = tmp_path_factory.mktemp("run") / "infer.sock"
    async with AsyncExitStack() as stack:
        yield lambda: stack.enter_async_context(serving(repo.root, socket, QueueLimits()))


async def refused(call) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await call
    return err.value.code().name, err.value.details()


def told(response: pb.ModelInferResponse) -> list[float]:
    return output(response, "y").reshape(-1).tolist()


@pytest.mark.parametrize("isolation", ["process", "none"])
async def test_a_sequence_stays_in_one_process(repo, serve, isolation):
    isolated = f'parameters {{ key: "isolation" value {{ string_value: "{isolation}" }} }}'
    repo.python("m", REMEMBERS, CONFIG % (2, isolated))
    infer = (await serve()).stub.ModelInfer
    starts = await asyncio.gather(*(infer(step("m", n, n, start=True)) for n in range(1, 7)))
    homes = {n: told(response)[1] for n, response in enumerate(starts, 1)}
    assert len(set(homes.values())) == (2 if isolation == "process" else 1)
    assert [told(response)[2:4] for response in starts] == [[1, 1]] * 6
    for k in (2, 3):
        responses = await asyncio.gather(*(infer(step("m", n, n)) for n in range(1, 7)))
        assert [told(response)[:4] for response in responses] == [[k * n, homes[n], 0, 0] for n in range(1, 7)]
    assert told(await infer(step("m", 1, 1, end=True)))[3] == 2


async def test_the_models_own_error_leaves_the_sequence(repo, serve):
    repo.python("m", REMEMBERS, CONFIG % (1, ""))
    infer = (await serve()).stub.ModelInfer
    await infer(step("m", "abc", 5, start=True))
    assert await refused(infer(step("m", "abc", -1))) == ("NOT_FOUND", "below zero")
    assert told(await infer(step("m", "abc", 1)))[0] == 6


@pytest.mark.parametrize("when", ["idle", "running"])
async def test_a_dead_process_ends_its_sequences_and_no_others(repo, serve, when):
    repo.python("m", REMEMBERS, CONFIG % (2, ""))
    infer = (await serve()).stub.ModelInfer
    starts = await asyncio.gather(*(infer(step("m", n, n, start=True)) for n in (1, 2, 3, 4)))
    homes = {n: int(told(response)[1]) for n, response in enumerate(starts, 1)}
    lost = [n for n in homes if homes[n] == homes[1]]
    if when == "idle":
        os.kill(homes[1], signal.SIGKILL)
    else:
        code, message = await refused(infer(step("m", 1, 666)))
        assert code == "INTERNAL"
        assert "process died" in message
    for n in homes:
        if n in lost:
            code, message = await refused(infer(step("m", n, 1)))
            assert (code, START_IT in message) == ("INVALID_ARGUMENT", True), message
        else:
            assert told(await infer(step("m", n, 1)))[:2] == [n + 1, homes[n]]

    async def starts_again() -> bool:
        try:
            response = told(await infer(step("m", 1, 1, start=True)))
        except grpc.aio.AioRpcError as err:
            if err.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return response[0] == 1

    await until(starts_again, "a sequence can be started again")
    assert told(await infer(step("m", 1, 1)))[0] == 2


async def test_shoals_own_form_with_a_state(repo, serve):
    repo.python("m", OWN, OWN_CONFIG)
    infer = (await serve()).stub.ModelInfer
    await asyncio.gather(*(infer(step("m", f"käse-{n}", n, start=True)) for n in (1, 2, 3)))
    responses = await asyncio.gather(*(infer(step("m", f"käse-{n}", n)) for n in (3, 1)))
    assert [output(response, "y").tolist() for response in responses] == [[6], [2]]
    assert [output(response, "id").reshape(-1)[0].decode() for response in responses] == ["käse-3", "käse-1"]


async def test_an_onnx_model_in_a_process_of_its_own(repo, serve):
    put(repo, "m", config("direct { }", more='parameters { key: "isolation" value { string_value: "process" } }'))
    infer = (await serve()).stub.ModelInfer
    await asyncio.gather(*(infer(step("m", n, n, start=True)) for n in (1, 2)))
    responses = await asyncio.gather(*(infer(step("m", n, n)) for n in (2, 1)))
    assert [output(response, "total").item() for response in responses] == [4, 2]
    assert [output(response, "product").item() for response in responses] == [9, 4]


CALLS = """
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            return [self.respond(request) for request in requests]

        def respond(self, request):
            inner = pb_utils.InferenceRequest(
                model_name="m",
                requested_output_names=["y"],
                inputs=request.inputs(),
                correlation_id=request.correlation_id(),
                flags=request.flags(),
            )
            response = inner.exec()
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            return pb_utils.InferenceResponse(response.output_tensors())
"""

CALLS_CONFIG = """
backend: "python"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_FP64 dims: 4 }
"""


@pytest.mark.parametrize("id", [7, -1, "text"])
async def test_a_model_passes_its_callers_sequence_on(repo, serve, id):
    repo.python("m", REMEMBERS, CONFIG % (1, ""))
    repo.python("outer", CALLS, CALLS_CONFIG)
    infer = (await serve()).stub.ModelInfer
    assert START_IT in (await refused(infer(step("outer", id, 1))))[1]
    totals = [told(await infer(step("outer", id, 2, start=n == 0, end=n == 2)))[0] for n in range(3)]
    assert totals == [2, 4, 6]
