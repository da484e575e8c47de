"""Calls that Python models make of other models inherit from the outer call, end with it, and wait in no cycle."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from services.infer.model_process.channel import Message
from services.infer.model_process.inner_calls import (
    MOST_SEARCHED,
    InnerCall,
    InnerCalls,
    ModelRun,
    OuterCall,
    Waits,
    outer_of,
)
from services.infer.requests.parameters import Parameters
from shoal.errors import Internal, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.tenant_header import TENANT_HEADER
from tests.breakable import until
from tests.infer.conftest import Serving, floats, output, request
from tests.infer.scheduling import virtual_time

CONFIG = """backend: "python" max_batch_size: 0
    input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
    output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
    dynamic_batching { priority_levels: 3 default_priority_level: 2 }
    instance_group { count: COUNT kind: KIND_CPU }"""

CALLER = """
    import os, time
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            return [self.one(request) for request in requests]

        def one(self, request):
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if x[0] <= 0:
                return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
            MEET
            inner = pb_utils.InferenceRequest(model_name="TO", requested_output_names=["y"],
                request_id=request.request_id(), inputs=[pb_utils.Tensor("x", x - 1)])
            return inner.exec()
"""

HOLD = """
    import time
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            while not all(request.is_cancelled() for request in requests):
                time.sleep(0.005)
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError("nobody waits")) for _ in requests]
"""


def caller(repo, name: str, to: str, *, count: int = 1, meet: str = "pass") -> None:
    repo.python(name, CALLER.replace("TO", to).replace("MEET", meet), CONFIG.replace("COUNT", str(count)))


async def called(serving: Serving, model: str, x: float) -> list[float]:
    return output(await serving.core.infer(request(model, x=floats([x])[0])), "y").tolist()


@dataclass
class Seen:
    """One call of the core that a model made."""

    model: str
    id: str
    deadline: float
    tenant: str
    priority: int
    outcome: str = "running"


@pytest.fixture
def seen(monkeypatch) -> Callable[[Serving], list[Seen]]:
    """Records the calls that models make from then on."""

    def watch(serving: Serving) -> list[Seen]:
        found: list[Seen] = []
        infer = serving.core.infer

        async def recorded(message: pb.ModelInferRequest, deadline: float = math.inf, tenant: str = "", **more: Any):
            priority = message.parameters["priority"].uint64_param if "priority" in message.parameters else 0
            call = Seen(message.model_name, message.id, deadline, tenant, priority)
            found.append(call)
            try:
                response = await infer(message, deadline, tenant, **more)
            except BaseException as err:
                call.outcome = type(err).__name__
                raise
            call.outcome = "done"
            return response

        monkeypatch.setattr(serving.core, "infer", recorded)
        return found

    return watch


@pytest.mark.parametrize("isolation", ["process", "shared"])
async def test_an_inner_call_inherits_deadline_tenant_and_priority(repo, serve, seen, isolation):
    caller(repo, "outer", "middle")
    caller(repo, "middle", "last")
    caller(repo, "last", "nobody")
    serving = await serve()
    calls = seen(serving)
    message = request("outer", x=floats([2])[0])
    message.parameters["priority"].uint64_param = 3
    before = time.monotonic()
    await serving.stub.ModelInfer(message, timeout=300, metadata=[(TENANT_HEADER, "blue")])
    outer, middle, last = calls
    # gRPC sends a timeout of minutes in whole seconds, rounded up: 301 where a millisecond more than 300 remains.
    assert before < outer.deadline < time.monotonic() + 301
    assert (middle.deadline, middle.tenant, middle.priority) == (outer.deadline, "blue", 3)
    assert (last.deadline, last.tenant, last.priority) == (outer.deadline, "blue", 3)


async def test_the_end_of_the_outer_call_ends_its_inner_calls_and_frees_the_instance(repo, serve, seen):
    caller(repo, "outer", "middle")
    caller(repo, "middle", "hold")
    repo.python("hold", HOLD, CONFIG.replace("COUNT", "1"))
    serving = await serve()
    calls = seen(serving)

    async def is_held() -> bool:
        return [call.model for call in calls] == ["outer", "middle", "hold"]

    async def all_ended() -> bool:
        return [call.outcome for call in calls[1:]] == ["CancelledError", "CancelledError"]

    cancelled = serving.stub.ModelInfer(request("outer", x=floats([2])[0]))
    await until(is_held)
    cancelled.cancel()
    await until(all_ended)
    # Both callers run again.
    assert await called(serving, "outer", 0) == [0]
    assert await called(serving, "middle", 0) == [0]
    calls.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.ModelInfer(request("outer", x=floats([2])[0]), timeout=1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await called(serving, "outer", 0) == [0]
    assert await called(serving, "middle", 0) == [0]


async def test_a_timeout_of_the_model_ends_its_call_while_that_runs(repo, serve):
    repo.python("hold", HOLD, CONFIG.replace("COUNT", "1"))
    source = CALLER.replace("TO", "hold").replace("MEET", "pass").replace("inputs=", "timeout=200000, inputs=")
    repo.python("outer", source, CONFIG.replace("COUNT", "1"))
    serving = await serve()
    with pytest.raises(ShoalError, match="the deadline of the call of model 'hold' has passed"):
        await called(serving, "outer", 1)


async def test_a_call_in_a_cycle_without_a_free_instance_is_rejected(repo, serve):
    caller(repo, "itself", "itself")
    caller(repo, "a", "b")
    caller(repo, "b", "a", count=2)
    caller(repo, "by_ensemble", "steps")
    repo.python("steps", "", STEPS)
    (repo.root / "steps" / "1" / "model.py").unlink()
    serving = await serve()
    for model, x, cycle in (
        ("itself", 1, "itself -> itself"),
        ("a", 2, "b -> a -> b"),
        ("by_ensemble", 1, "by_ensemble -> by_ensemble"),
    ):
        with pytest.raises(Internal, match=f"{cycle} is a cycle") as caught:
            await called(serving, model, x)
        assert "instance_group count" in caught.value.message
        assert await called(serving, model, 0) == [0]


STEPS = """platform: "ensemble" max_batch_size: 0
    input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
    output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
    ensemble_scheduling { step { model_name: "by_ensemble" model_version: -1
        input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }"""


async def test_a_cycle_with_a_free_instance_works(repo, serve):
    caller(repo, "itself", "itself", count=3)
    serving = await serve()
    assert await called(serving, "itself", 2) == [0]
    with pytest.raises(Internal, match="itself -> itself is a cycle"):
        await called(serving, "itself", 3)
    # A call may wait for runs that make no call themselves.
    outcomes = await asyncio.gather(*(called(serving, "itself", n % 2) for n in range(12)), return_exceptions=True)
    assert [outcome for outcome in outcomes[::2] if outcome != [0]] == []
    assert all(outcome == [0] or "is a cycle" in str(outcome) for outcome in outcomes)
    assert await called(serving, "itself", 2) == [0]


async def test_models_that_call_each_other_at_the_same_time_do_not_wait_for_ever(repo, serve, tmp_path):
    """Neither chain of callers names a model twice: each holds the only instance that the other one needs."""
    meet = (
        f"open(os.path.join({str(tmp_path)!r}, request.model_name()), 'w').close(); "
        f"[time.sleep(0.005) for _ in iter(lambda: len(os.listdir({str(tmp_path)!r})) >= COUNT, True)]"
    )
    (tmp_path / "models").mkdir()
    caller(repo, "a", "b", meet=meet.replace("COUNT", "3"))
    caller(repo, "b", "a", meet=meet.replace("COUNT", "3"))
    serving = await serve()
    outcomes = await asyncio.gather(called(serving, "a", 1), called(serving, "b", 1), return_exceptions=True)
    rejected = [outcome for outcome in outcomes if outcome != [0]]
    assert len(rejected) == 1
    assert "is a cycle" in str(rejected[0])
    assert [await called(serving, model, 0) for model in ("a", "b")] == [[0], [0]]


DECOUPLED = """
    import threading
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "x")
                inner = pb_utils.InferenceRequest(model_name="plain", requested_output_names=["y"],
                    request_id=request.request_id(), inputs=[x])
                sender = request.get_response_sender()
                sender.send(inner.exec())
                threading.Thread(target=self.rest, args=(inner, sender)).start()

        def rest(self, inner, sender):
            sender.send(inner.exec(), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.mark.parametrize("isolation", ["process", "shared"])
async def test_inner_calls_of_a_decoupled_model_inherit_from_their_own_request(repo, serve, seen, isolation):
    caller(repo, "plain", "nobody")
    config = CONFIG.replace("COUNT", "1").replace("dynamic_batching", "model_transaction_policy { decoupled: true } #")
    repo.python("stream", DECOUPLED, config)
    serving = await serve()
    calls = seen(serving)

    async def stream(tenant: str) -> int:
        call = serving.stub.ModelStreamInfer(metadata=[(TENANT_HEADER, tenant)], timeout=300)
        for n in range(3):
            await call.write(request("stream", id=f"{tenant} {n}", x=floats([0])[0]))
        await call.done_writing()
        found = [response async for response in call]
        assert [response.error_message for response in found] == [""] * 6
        return len(found)

    await asyncio.gather(stream("blue"), stream("red"))
    assert len(calls) == 12
    for n in range(3):
        for tenant in ("blue", "red"):
            # The first call of each is made on the model's main thread, the second on a thread of the model's own.
            first, *_ = [call for call in calls if call.id == f"{tenant} {n}"]
            assert first.tenant == tenant
    assert all(call.deadline < time.monotonic() + 300 for call in calls)


AFTER_THE_END = """
    import threading, time
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                x, sender = pb_utils.get_input_tensor_by_name(request, "x"), request.get_response_sender()
                if x.as_numpy()[0] == 1:
                    self.waiting = request, sender
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", x.as_numpy())]))
                    continue
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                inner = pb_utils.InferenceRequest(model_name="plain", requested_output_names=["y"], inputs=[x])
                error = inner.exec().error()
                text = error.message() if error else "it was made"
                self.waiting[1].send(pb_utils.InferenceResponse(error=pb_utils.TritonError(text)),
                    flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.mark.parametrize("isolation", ["process", "shared"])
async def test_a_call_for_a_decoupled_request_that_has_ended_is_not_made_for_another_one(repo, serve, seen, isolation):
    caller(repo, "plain", "nobody")
    config = CONFIG.replace("COUNT", "1").replace("dynamic_batching", "model_transaction_policy { decoupled: true } #")
    repo.python("stream", AFTER_THE_END, config)
    serving = await serve()
    calls = seen(serving)
    waiting = serving.stub.ModelStreamInfer(metadata=[(TENANT_HEADER, "blue")], timeout=300)
    await waiting.write(request("stream", x=floats([1])[0]))
    assert not (await waiting.read()).error_message
    ending = serving.stub.ModelStreamInfer(metadata=[(TENANT_HEADER, "red")], timeout=300)
    await ending.write(request("stream", x=floats([0])[0]))
    assert "only while a request is executed" in (await waiting.read()).error_message
    assert calls == []
    for call in (waiting, ending):
        await call.done_writing()
        async for _ in call:
            pass


@dataclass
class Item:
    deadline: float
    tenant: str = ""
    is_abandoned: bool = False
    priority: int = 0

    @property
    def request(self):
        return replace(virtual_time.call(1, 1), parameters=Parameters(priority=self.priority))


def test_a_batch_gives_its_inner_calls_the_latest_deadline_and_the_first_waiting_tenant():
    batch = [Item(9.0, "gone", is_abandoned=True, priority=1), Item(2.0, "a", priority=2), Item(5.0, "b")]
    found = outer_of(batch)
    assert (found.deadline, found.tenant, found.priority) == (5.0, "a", 2)
    assert outer_of(batch[:1]).tenant == "gone"


class IdleModel:
    name, instances = "m", ()


def test_a_run_that_is_over_calls_nothing_and_one_that_ends_calls_its_watcher():
    ended = []
    run = ModelRun(IdleModel(), OuterCall)
    assert run.watch(lambda: ended.append(1))
    run.end()
    assert ended
    over = ModelRun(IdleModel(), OuterCall)
    over.end()
    assert not over.watch(lambda: None)


class IdleCore:
    """A core whose calls end at once, without outputs."""

    async def infer(self, message: pb.ModelInferRequest, *_: object, **__: object) -> pb.ModelInferResponse:
        return pb.ModelInferResponse()

    def sessions(self, name: str, version: str) -> tuple[object, ...]:
        return ()


class EndsFirst(ModelRun):
    """A run that another thread ends before the task of its call has begun."""

    def watch(self, on_end: Callable[[], None]) -> bool:
        was_watched = super().watch(on_end)
        self.end()
        return was_watched


async def replies_to_a_call(run: ModelRun, between: Callable[[], None]) -> list[dict[str, Any]]:
    """Return the replies to one call of `run`; `between` runs once the reply waits for a thread."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    may_go_on = threading.Event()
    loop.run_in_executor(None, may_go_on.wait)
    calls, replies = InnerCalls(), []
    calls.bind(IdleCore())
    header = {"model": "m", "version": "", "request_id": "", "parameters": {}, "outputs": []}
    calls(Message(header, []), run, lambda header, parts: replies.append(header))
    for _ in range(10):
        await asyncio.sleep(0)
    between()
    for _ in range(10):
        await asyncio.sleep(0)
    may_go_on.set()
    # The executor has one thread: the reply, if any, was before this.
    await loop.run_in_executor(None, lambda: None)
    return replies


async def test_the_model_gets_a_response_when_its_run_ends_before_the_call_begins():
    (reply,) = await replies_to_a_call(EndsFirst(IdleModel(), OuterCall), lambda: None)
    assert reply["code"] == "CANCELLED"


async def test_the_model_gets_a_response_when_its_run_ends_while_the_response_waits_for_a_thread():
    run = ModelRun(IdleModel(), OuterCall)
    assert await replies_to_a_call(run, run.end) == [{}]


@dataclass(eq=False)
class WaitingModel:
    name: str
    instances: range


@pytest.mark.parametrize(("runs", "has_cycle"), [(100, True), (10_000, False)])
def test_a_search_for_a_cycle_looks_at_a_bounded_number_of_waits(runs, has_cycle, monkeypatch):
    waits, model, looked = Waits(), WaitingModel("m", range(runs)), []
    for _ in range(runs):
        run, call = ModelRun(model, OuterCall), InnerCall((model,))
        waits.add(run, call)
    groups_of = waits._groups_of
    monkeypatch.setattr(waits, "_groups_of", lambda call: looked.append(call) or groups_of(call))
    assert waits.cycle(run, call) == (["m", "m", "m"] if has_cycle else [])
    assert len(looked) <= MOST_SEARCHED


def test_calls_of_models_that_are_idle_are_not_searched(monkeypatch):
    waits, model, idle = Waits(), WaitingModel("m", range(10_000)), WaitingModel("idle", range(1))
    for _ in range(10_000):
        run, call = ModelRun(model, OuterCall), InnerCall((idle,))
        waits.add(run, call)
    looked: list[object] = []
    groups_of = waits._groups_of
    monkeypatch.setattr(waits, "_groups_of", lambda call: looked.append(call) or groups_of(call))
    assert waits.cycle(run, call) == []
    assert looked == [call]
