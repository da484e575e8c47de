"""Decoupled models through the server: any number of responses, pauses, cancellation, and what goes wrong."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

import grpc
import numpy as np
import pytest

from services.infer import metrics
from services.infer.core import InferenceServer
from services.infer.model_process import poison
from services.infer.model_process.poison import fingerprint
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling import decoupled
from shoal.errors import DeadlineExceeded, ResourceExhausted, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer.conftest import output, request


@pytest.fixture(params=["process", "shared"])
def isolation(request) -> str:
    return request.param


async def each(
    core: InferenceServer, asked: pb.ModelInferRequest, deadline: float = math.inf
) -> AsyncGenerator[pb.ModelInferResponse, None]:
    """The responses to one request; an error that the model gives is raised."""
    async with aclosing(core.responses(asked, deadline)) as responses:
        async for response in responses:
            if isinstance(response, ShoalError):
                raise response
            yield response


COUNT = """
    import os, time
    import numpy as np
    class Model:
        def load(self, folder, config):
            self.journal = os.path.join(folder, "journal")
        def predict(self, batch):
            n = int(batch["n"][0])
            try:
                if n < 0:
                    raise ValueError("negative")
                for i in range(n):
                    with open(self.journal, "a") as out:
                        out.write(f"{i}\\n")
                    if i == 700:
                        os._exit(7)
                    yield {"i": np.array([i], np.int32)}
            except GeneratorExit:
                with open(self.journal, "a") as out:
                    out.write("closed\\n")
                raise
"""

COUNT_CONFIG = """backend: "python"
input { name: "n" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "i" data_type: TYPE_INT32 dims: [ 1 ] }
"""

REPEAT = """
    import json, threading, time
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        @staticmethod
        def auto_complete_config(auto_complete_model_config):
            auto_complete_model_config.add_input({"name": "IN", "data_type": "TYPE_INT32", "dims": [-1]})
            auto_complete_model_config.add_input({"name": "DELAY", "data_type": "TYPE_UINT32", "dims": [-1]})
            auto_complete_model_config.add_output({"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]})
            auto_complete_model_config.add_output({"name": "IDX", "data_type": "TYPE_UINT32", "dims": [1]})
            auto_complete_model_config.set_max_batch_size(0)
            auto_complete_model_config.set_model_transaction_policy(dict(decoupled=True))
            return auto_complete_model_config

        def initialize(self, args):
            assert pb_utils.using_decoupled_model_transaction_policy(json.loads(args["model_config"]))
            self.cancelled = 0

        def execute(self, requests):
            for request in requests:
                thread = threading.Thread(target=self.respond, args=(
                    request.get_response_sender(),
                    pb_utils.get_input_tensor_by_name(request, "IN").as_numpy(),
                    pb_utils.get_input_tensor_by_name(request, "DELAY").as_numpy()))
                thread.daemon = True
                thread.start()
            return None

        def respond(self, sender, values, delays):
            for index, (value, delay) in enumerate(zip(values, delays)):
                time.sleep(delay / 1000)
                if sender.is_cancelled():
                    self.cancelled += 1
                    break
                if value == 13:
                    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("thirteen")))
                    continue
                sender.send(pb_utils.InferenceResponse([
                    pb_utils.Tensor("OUT", np.array([value], np.int32)),
                    pb_utils.Tensor("IDX", np.array([index], np.uint32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def count(n: int, id: str = "", *, with_final: bool = False) -> pb.ModelInferRequest:
    made = request("count", id=id, n=np.array([n], np.int32))
    if with_final:
        made.parameters["triton_enable_empty_final_response"].bool_param = True
    return made


def repeat(values: Sequence[int], delays: Sequence[int], id: str = "") -> pb.ModelInferRequest:
    made = request("repeat", id=id, IN=np.array(values, np.int32))
    made.inputs.add(name="DELAY", datatype="UINT32", shape=[len(delays)])
    made.raw_input_contents.append(np.array(delays, np.uint32).tobytes())
    return made


async def sent(*requests: pb.ModelInferRequest) -> AsyncIterator[pb.ModelInferRequest]:
    for each in requests:
        yield each


async def collected(stub, *requests: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    return [response async for response in stub.ModelStreamInfer(sent(*requests))]


def journal(repo) -> list[str]:
    file: Path = repo.root / "count" / "1" / "journal"
    return file.read_text().split() if file.exists() else []


async def test_each_yield_is_a_response(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    responses = await collected(serving.stub, count(3, "a"), count(0, "b"), count(2, "c", with_final=True))
    by_id = {id: [a.infer_response for a in responses if a.infer_response.id == id] for id in "abc"}
    assert [output(r, "i").tolist() for r in by_id["a"]] == [[0], [1], [2]]
    assert [r.parameters["triton_final_response"].bool_param for r in by_id["a"]] == [False] * 3
    assert by_id["b"] == []
    assert [len(r.outputs) for r in by_id["c"]] == [1, 1, 0]
    assert [r.parameters["triton_final_response"].bool_param for r in by_id["c"]] == [False, False, True]
    assert not any(response.error_message for response in responses)
    stats = (await serving.stub.ModelStatistics(pb.ModelStatisticsRequest(name="count"))).model_stats[0]
    assert (stats.inference_stats.success.count, stats.inference_stats.fail.count) == (3, 0)


async def test_a_decoupled_model_has_metrics(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    families = {family for family, labels, _ in metrics.source(serving.models)() if labels[:1] == ("count",)}
    assert {metrics.REQUESTS, metrics.FIRST} <= families
    assert metrics.WAITING not in families


async def test_a_unary_call_of_a_decoupled_model_is_rejected(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await serving.stub.ModelInfer(count(1))
    assert err.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert err.value.details() == "ModelInfer RPC doesn't support models with decoupled transaction policy"


async def test_an_error_ends_its_request_and_not_the_stream(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    wrong = pb.ModelInferRequest(model_name="count", id="w")
    responses = await collected(serving.stub, count(-1, "n"), wrong, count(1, "g"), request("nobody", id="x"))
    texts = {a.infer_response.id: a.error_message for a in responses}
    assert "ValueError: negative (model.py, line 11)" in texts["n"]
    assert "missing 'n'" in texts["w"]
    assert "unknown model: 'nobody'" in texts["x"]
    assert texts["g"] == ""


async def test_tritons_repeat_model_interleaves_responses_and_continues_after_an_error(repo, serve):
    repo.python("repeat", REPEAT, 'backend: "python"')
    serving = await serve()
    responses = await collected(serving.stub, repeat([1, 13, 3], [0, 0, 2_000], "slow"), repeat([7, 8], [0, 0], "fast"))
    ids = [response.infer_response.id for response in responses]
    assert ids.count("slow") == 3
    assert ids.count("fast") == 2
    assert ids[-1] == "slow"
    slow = [response for response in responses if response.infer_response.id == "slow"]
    assert [response.error_message for response in slow] == ["", "thirteen", ""]
    assert [output(a.infer_response, "OUT").tolist() for a in slow if not a.error_message] == [[1], [3]]


async def test_a_model_faster_than_its_caller_is_paused(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    responses = each(serving.core, count(500))
    assert output(await anext(responses), "i").tolist() == [0]
    await until(lambda: len(journal(repo)) >= 16)
    seen = [output(await anext(responses), "i")[0] for _ in range(99)]
    assert seen == list(range(1, 100))
    assert len(journal(repo)) <= 100 + 2 * 16
    # While one caller does not read, another is served.
    other = [output(r, "i")[0] async for r in each(serving.core, count(40))]
    assert other == list(range(40))
    await responses.aclose()
    await until(lambda: "closed" in journal(repo))


async def test_a_client_that_disconnects_closes_the_generator(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    call = serving.stub.ModelStreamInfer(sent(count(500)))
    await call.read()
    call.cancel()
    await until(lambda: "closed" in journal(repo))
    assert len(journal(repo)) < 500
    assert len(await collected(serving.stub, count(3))) == 3


async def test_a_deadline_ends_the_stream_and_reaches_the_model(repo, serve):
    repo.python("repeat", REPEAT, 'backend: "python"')
    serving = await serve()
    loop = asyncio.get_running_loop()
    with pytest.raises(DeadlineExceeded):
        async for _ in each(serving.core, repeat([1] * 100, [30] * 100), loop.time() + 0.2):
            pass
    scheduler = serving.models.find("repeat", "").decoupled
    await until(lambda: not scheduler._streams)


async def test_a_crash_is_reported_and_the_request_is_not_retried(repo, serve):
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    responses = await collected(serving.stub, count(701, "k"))
    assert len(responses) == 702 or len(responses) > 600
    assert "process died (exit code 7)" in responses[-1].error_message
    (response,) = await collected(serving.stub, count(701, "k"))
    assert "it is rejected for" in response.error_message

    async def is_back() -> bool:
        return [a.error_message for a in await collected(serving.stub, count(2))] == ["", ""]

    await until(is_back)


async def test_large_inputs_are_compared_with_those_of_a_crash_beside_the_event_loop(repo, serve, monkeypatch):
    monkeypatch.setattr(decoupled, "_LONG_BYTES", 0)
    on_threads: list[bool] = []

    def observed(request: InferenceRequest) -> bytes:
        on_threads.append(threading.current_thread() is not threading.main_thread())
        return fingerprint(request)

    monkeypatch.setattr(poison, "fingerprint", observed)
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    assert "process died" in (await collected(serving.stub, count(701, "k")))[-1].error_message

    async def is_rejected() -> bool:
        return "it is rejected for" in (await collected(serving.stub, count(701, "k")))[-1].error_message

    await until(is_rejected)
    assert on_threads
    assert all(on_threads)


@pytest.mark.parametrize("most", [1, 2])
async def test_requests_beyond_max_streams_are_queued(repo, serve, most):
    config = COUNT_CONFIG + f'parameters {{ key: "max_streams" value {{ string_value: "{most}" }} }}'
    repo.python("count", COUNT, config)
    serving = await serve()
    held = [each(serving.core, count(500)) for _ in range(most)]
    for responses in held:
        await anext(responses)
    patient = each(serving.core, count(1))
    waiting = asyncio.ensure_future(anext(patient))
    scheduler = serving.models.find("count", "").decoupled
    await until(lambda: scheduler._waiting.count == 1)
    late = each(serving.core, count(1), asyncio.get_running_loop().time() + 0.05)
    with pytest.raises(DeadlineExceeded):
        await anext(late)
    await held[0].aclose()
    assert output(await waiting, "i").tolist() == [0]
    for responses in (patient, *held):
        await responses.aclose()


async def test_long_streams_of_one_tenant_leave_places_to_others(repo, serve):
    config = COUNT_CONFIG + 'parameters { key: "max_streams" value { string_value: "4" } }'
    repo.python("count", COUNT, config)
    serving = await serve()
    scheduler = serving.models.find("count", "").decoupled
    streams = [serving.core.responses(count(500), tenant="flood") for _ in range(6)]
    flood = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await until(lambda: sum(task.done() for task in flood) == 3 and scheduler._waiting.count == 3)
    async with asyncio.timeout(20), aclosing(serving.core.responses(count(1), tenant="other")) as responses:
        assert output(await anext(responses), "i").tolist() == [0]
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    for stream in streams:
        await stream.aclose()


async def test_a_response_that_contradicts_the_declaration_is_an_error(repo, serve):
    repo.python("count", COUNT.replace("np.array([i], np.int32)", "np.zeros((2, 2), np.int32)"), COUNT_CONFIG)
    serving = await serve()
    responses = await collected(serving.stub, count(1))
    assert "output 'i' has shape [2,2], expected [1]" in responses[0].error_message


async def test_big_responses(repo, serve):
    source = COUNT.replace("np.array([i], np.int32)", "np.full(1 << 20, i, np.int32)")
    repo.python(
        "count",
        source,
        COUNT_CONFIG.replace(
            'name: "i" data_type: TYPE_INT32 dims: [ 1 ]', 'name: "i" data_type: TYPE_INT32 dims: [ -1 ]'
        ),
    )
    serving = await serve()
    sums = [int(output(r, "i").sum()) async for r in each(serving.core, count(30), math.inf)]
    assert sums == [n << 20 for n in range(30)]


async def test_few_large_responses_are_in_flight(repo, serve):
    source = COUNT.replace("np.array([i], np.int32)", "np.full(1 << 18, i, np.int32)")
    repo.python(
        "count",
        source,
        COUNT_CONFIG.replace('"i" data_type: TYPE_INT32 dims: [ 1 ]', '"i" data_type: TYPE_INT32 dims: [ -1 ]'),
    )
    serving = await serve()
    async with aclosing(each(serving.core, count(50))) as responses:
        await anext(responses)
        # Other requests of the model run to their ends meanwhile.
        for _ in range(3):
            assert len([1 async for _ in each(serving.core, count(3))]) == 3
        own = len(journal(repo)) - 9
        assert own <= 1 + 2 + 1, "one is read, two are in flight, the next one is made"


LARGE = """
    import numpy as np
    class Model:
        def predict(self, batch):
            for i in range(int(batch["n"][0])):
                yield {"i": np.full([1 << 18], i, np.int32)}
"""
LARGE_CONFIG = COUNT_CONFIG.replace('"i" data_type: TYPE_INT32 dims: [ 1 ]', '"i" data_type: TYPE_INT32 dims: [ -1 ]')


class CallMemory:
    """Memory of a call with a limit of 2.5 MiB."""

    def __init__(self) -> None:
        self.held = 0
        self.refused = 0

    def hold(self, size: int) -> None:
        if self.held + size > 5 << 19:
            self.refused += 1
            raise ResourceExhausted("no room")
        self.held += size

    hold_response = hold

    def release(self, size: int) -> None:
        self.held -= size
        assert self.held >= 0


async def test_raw_contents_of_a_response_are_those_that_the_model_process_sent(repo, serve):
    repo.python("large", LARGE, LARGE_CONFIG)
    serving, raw, count = await serve(), [], 0
    async with aclosing(serving.core.responses(request("large", n=np.array([2], np.int32)), raw=raw)) as responses:
        async for response in responses:
            assert not response.raw_output_contents
            if response.outputs:
                (contents,) = raw
                assert (contents.nbytes, contents.base is None) == (1 << 20, False)
                count += 1
            raw.clear()
    assert count == 2


async def test_responses_that_are_not_read_count_and_a_request_beyond_the_limit_ends(serve, repo):
    repo.python("large", LARGE, LARGE_CONFIG)
    repo.python("count", COUNT, COUNT_CONFIG)
    serving = await serve()
    memory = CallMemory()
    asked = request("large", n=np.array([8], np.int32))
    async with aclosing(serving.core.responses(asked, memory=memory)) as responses:
        await anext(responses)
        await until(lambda: memory.refused > 0, "a response finds no room")
        assert [output(response, "i").tolist() async for response in each(serving.core, count(2))] == [[0], [1]]
        with pytest.raises(ResourceExhausted):
            async for _ in responses:
                pass
