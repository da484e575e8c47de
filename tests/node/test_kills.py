"""`kill -9` of one process at a time: what a client sees (nothing), what becomes of jobs (all of them end, once)."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import PREFIX
from mesh.rpc.channel import connect
from shoal.coord.v1 import coord_pb2, coord_pb2_grpc
from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import inference_pb2_grpc as oip_grpc
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.long_form import by_form

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

PATIENCE_S = 90.0
JOBS = by_form(60, 120)
ENDED = {
    ingest_pb2.JOB_STATE_SUCCEEDED,
    ingest_pb2.JOB_STATE_FAILED,
    ingest_pb2.JOB_STATE_DEAD,
    ingest_pb2.JOB_STATE_CANCELLED,
    ingest_pb2.JOB_STATE_EXPIRED,
}


@pytest.fixture(scope="module")
def running(node: Any, onnx_models: Path) -> Any:
    """A node with two of everything that a kill may take."""
    one = node("--replicas", "infer=2,coord=2,ingest=2")
    one.shoal("models", "push", str(onnx_models / "double.onnx"))
    one.shoal("models", "push", str(onnx_models / "slow.onnx"))
    return one


@pytest.fixture
def whole(running: Any) -> Iterator[Any]:
    """The node, with every process alive again after the test, whatever the test did to it."""
    yield running
    asyncio.run(until(lambda: everyone_is_ready(running), "every instance is ready again"))


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits until `condition` holds; a call that fails meanwhile counts as no."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    if await condition():
                        return
                except (grpc.aio.AioRpcError, FileNotFoundError):
                    pass
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"not within {PATIENCE_S} s: {what}")


async def registered(one: Any) -> coord_pb2.ListInstancesResponse:
    async with connect(one.gateway) as channel:
        stub = coord_pb2_grpc.CoordServiceStub(channel)
        return await stub.ListInstances(coord_pb2.ListInstancesRequest(), timeout=10)


async def everyone_is_ready(one: Any) -> bool:
    """Each process of the ready file is registered, as READY, under the pid that it has now."""
    answer = await registered(one)
    ready = {i.name.partition("/")[2]: i.pid for i in answer.instances if i.state == coord_pb2.INSTANCE_STATE_READY}
    ours = {name: pid for name, pid in one.pids().items() if "-" in name}
    return not answer.stale and ready == ours


async def are_unregistered(one: Any, *names: str) -> bool:
    answer = await registered(one)
    return not answer.stale and not {i.name.partition("/")[2] for i in answer.instances} & {*names}


async def end_leases(one: Any, *names: str) -> None:
    """End the leases of instances in etcd, as if they had not been refreshed in time."""
    async with Etcd(one.etcd_address()) as etcd:
        for entry in (await etcd.list(PREFIX)).entries:
            if entry.key.decode().rpartition("/")[2] in names:
                await etcd.revoke(entry.lease)


def question(number: float, model: str = "double") -> oip.ModelInferRequest:
    """x = [number] * 4, asking who answers."""
    request = oip.ModelInferRequest(model_name=model, id=str(number))
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.parameters["explain"].bool_param = True
    request.raw_input_contents.append(np.full(4, number, np.float32).tobytes())
    return request


def right(number: float, answer: oip.ModelInferResponse) -> bool:
    return np.array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), np.full(4, 2 * number, np.float32))


@dataclass
class Load:
    """What a steady stream of calls through the gateway has seen so far."""

    answered: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    wrong: int = 0
    pause_s: float = 0.0
    """Between an answer and the next call of the same caller."""

    def calm_down(self) -> None:
        """Leave the machine to the processes that start: 8 callers make 150 calls a second from now on."""
        self.pause_s = 0.05

    async def sees(self, replica: str) -> None:
        """Waits for a further answer of `replica`."""
        before = self.answered[replica]

        async def more() -> bool:
            return self.answered[replica] > before

        await until(more, f"an answer of {replica}; so far {self.answered}, errors {self.errors[:3]}")

    async def goes_on(self, calls: int) -> None:
        """Waits for so many further answers."""
        goal = self.answered.total() + calls

        async def enough() -> bool:
            return self.answered.total() >= goal

        await until(enough, f"{calls} further answers; errors {self.errors[:3]}")


@asynccontextmanager
async def steady_load(gateway: str, callers: int = 8) -> AsyncIterator[Load]:
    """Call the model from `callers` tasks over two connections. Plain stubs: no retries."""
    load, numbers, stop = Load(), itertools.count(1), asyncio.Event()
    async with connect(gateway) as first, connect(gateway) as second:

        async def call(stub: oip_grpc.GRPCInferenceServiceStub) -> None:
            while not stop.is_set():
                number = float(next(numbers) % 1000)
                try:
                    answer = await stub.ModelInfer(question(number), timeout=30)
                except grpc.aio.AioRpcError as err:
                    load.errors.append(f"{err.code().name}: {err.details()}")
                    continue
                load.answered[answer.parameters["replica"].string_param] += 1
                load.wrong += not right(number, answer)
                await asyncio.sleep(load.pause_s)

        stubs = [oip_grpc.GRPCInferenceServiceStub(channel) for channel in (first, second)]
        tasks = [asyncio.create_task(call(stubs[n % 2])) for n in range(callers)]
        try:
            await load.goes_on(100)
            yield load
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def test_a_killed_replica_is_not_a_clients_problem(whole: Any) -> None:
    async with steady_load(whole.gateway) as load:
        await load.sees("local/infer-0")
        await load.sees("local/infer-1")
        for name in ("infer-0", "infer-1"):
            load.pause_s = 0.0
            await load.goes_on(50)
            old = whole.kill(name)
            await load.goes_on(200)
            load.calm_down()
            whole.wait_until_restarted(name, old)
            await until(lambda: everyone_is_ready(whole), f"{name} is back")
            await load.sees(f"local/{name}")
    assert (load.errors, load.wrong) == ([], 0)


async def test_a_drained_replica_gets_nothing_until_it_is_put_back(whole: Any) -> None:
    async with connect(whole.gateway) as channel, steady_load(whole.gateway) as load:
        coord = coord_pb2_grpc.CoordServiceStub(channel)
        drained = await coord.DrainInstance(coord_pb2.DrainInstanceRequest(name="infer-0"))
        assert drained.instance.drained_by_operator

        async def only_the_other() -> bool:
            before = load.answered["local/infer-0"]
            await load.goes_on(200)
            return load.answered["local/infer-0"] == before

        await until(only_the_other, "infer-0 gets nothing")
        await coord.UndrainInstance(coord_pb2.UndrainInstanceRequest(name="infer-0"))
        await load.sees("local/infer-0")
    assert (load.errors, load.wrong) == ([], 0)


async def test_the_leader_dies_another_leads_and_traffic_does_not_notice(whole: Any) -> None:
    async with connect(whole.gateway) as channel, steady_load(whole.gateway) as load:
        coord = coord_pb2_grpc.CoordServiceStub(channel)
        before = await coord.GetLeader(coord_pb2.GetLeaderRequest())
        name = before.instance.partition("/")[2]
        old = whole.kill(name)
        await load.goes_on(200)
        load.calm_down()

        async def another_leads() -> bool:
            now = await coord.GetLeader(coord_pb2.GetLeaderRequest(), timeout=10)
            return now.fencing_token > before.fencing_token

        await until(another_leads, "another replica leads, with a greater token")

        # xDS goes on: a change reaches Envoy through the replica that is left.
        await coord.DrainInstance(coord_pb2.DrainInstanceRequest(name="infer-1"))

        async def drained() -> bool:
            seen = load.answered["local/infer-1"]
            await load.goes_on(100)
            return load.answered["local/infer-1"] == seen

        await until(drained, "Envoy hears of the drain")
        await coord.UndrainInstance(coord_pb2.UndrainInstanceRequest(name="infer-1"))
        await load.sees("local/infer-1")
        whole.wait_until_restarted(name, old)
    assert (load.errors, load.wrong) == ([], 0)


async def test_etcd_stops_for_ten_seconds_and_inference_goes_on(whole: Any, onnx_models: Path) -> None:
    pid = whole.pids()["etcd"]
    async with steady_load(whole.gateway) as load:
        os.kill(pid, signal.SIGSTOP)
        load.calm_down()
        try:
            await asyncio.sleep(10)  # The outage itself.
            await load.goes_on(100)
        finally:
            os.kill(pid, signal.SIGCONT)
        await load.goes_on(100)
        await until(lambda: everyone_is_ready(whole), "everyone is registered again")
        await load.sees("local/infer-0")
        await load.sees("local/infer-1")
    assert (load.errors, load.wrong) == ([], 0)
    async with connect(whole.gateway) as channel:
        coord = coord_pb2_grpc.CoordServiceStub(channel)

        async def somebody_leads() -> bool:
            return bool((await coord.GetLeader(coord_pb2.GetLeaderRequest(), timeout=10)).instance)

        await until(somebody_leads, "somebody leads again")
    await asyncio.to_thread(whole.shoal, "models", "push", str(onnx_models / "double.onnx"), "--name", "after-etcd")


async def calls_every(pause_s: float, gateway: str, load: Load, stop: asyncio.Event) -> None:
    """Begin a call every `pause_s`, however many are open, until `stop`; return when all have ended."""
    async with connect(gateway) as channel, asyncio.TaskGroup() as calls:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)

        async def call() -> None:
            try:
                answer = await stub.ModelInfer(question(1.0), timeout=PATIENCE_S)
                load.answered[answer.parameters["replica"].string_param] += 1
            except grpc.aio.AioRpcError as err:
                load.errors.append(f"{err.code().name}: {err.details()}")

        while not stop.is_set():
            calls.create_task(call())
            await asyncio.sleep(pause_s)


async def test_infer_stands_still_for_longer_than_its_leases_and_calls_only_wait(whole: Any) -> None:
    pids = [whole.pids()[name] for name in ("infer-0", "infer-1")]
    load, stop = Load(), asyncio.Event()
    calls = asyncio.create_task(calls_every(0.006, whole.gateway, load, stop))
    await load.goes_on(100)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        # Not waited for: 4.5 s after they stopped, Envoy's health check has failed.
        await end_leases(whole, "infer-0", "infer-1")
        await until(lambda: are_unregistered(whole, "infer-0", "infer-1"), "coord sees that the leases have ended")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    await load.goes_on(100)
    await until(lambda: everyone_is_ready(whole), "everyone is registered again")
    await load.sees("local/infer-0")
    await load.sees("local/infer-1")
    stop.set()
    await calls
    assert Counter(load.errors) == Counter()


async def submit(stub: ingest_pb2_grpc.IngestServiceStub, numbers: range) -> dict[str, float]:
    """Submits slow jobs on one stream; the number of each by its job id, once all are acknowledged."""

    async def requests() -> AsyncIterator[ingest_pb2.SubmitStreamRequest]:
        for number in numbers:
            one = ingest_pb2.SubmitRequest(request=question(number, "slow"), idempotency_key=f"{numbers}-{number}")
            yield ingest_pb2.SubmitStreamRequest(sequence=number, submit=one)

    jobs: dict[str, float] = {}
    async for answer in stub.SubmitStream(requests(), timeout=PATIENCE_S):
        assert answer.code == 0, answer.message
        jobs[answer.job_id] = float(answer.sequence)
    assert len(jobs) == len(numbers)
    return jobs


async def every_job_ended_with_its_one_result(channel: grpc.aio.Channel, jobs: dict[str, float]) -> None:
    ingest = ingest_pb2_grpc.IngestServiceStub(channel)
    store = store_pb2_grpc.StoreServiceStub(channel)

    async def state(job_id: str) -> int:
        return int((await ingest.GetJob(ingest_pb2.GetJobRequest(id=job_id), timeout=30)).job.state)

    async def all_ended() -> bool:
        return all([await state(job_id) in ENDED for job_id in jobs])

    await until(all_ended, "every acknowledged job ends")
    states = Counter([await state(job_id) for job_id in jobs])
    assert states == {ingest_pb2.JOB_STATE_SUCCEEDED: len(jobs)}
    query = store_pb2.QueryResultsRequest(job_ids=list(jobs), page_size=1000)
    results: list[store_pb2.Result] = []

    async def are_read() -> bool:
        results[:] = (await store.QueryResults(query, timeout=30)).results
        return True

    # Envoy may not know yet that a store which was killed is well again.
    await until(are_read, "the results are read")
    assert Counter(result.job_id for result in results) == Counter(list(jobs))
    assert all(right(jobs[result.job_id], result.response) for result in results)


@pytest.mark.parametrize(
    ("first", "victims"),
    # Each kind once in the short form.
    by_form(
        [(3_000, ["store-0"]), (4_000, ["infer-1", "ingest-0"])],
        [
            (1_000, ["ingest-0", "ingest-1"]),
            (2_000, ["infer-0"]),
            (3_000, ["store-0"]),
            (4_000, ["infer-1", "ingest-0"]),
        ],
    ),
)
async def test_every_acknowledged_job_ends_with_one_result(whole: Any, first: int, victims: list[str]) -> None:
    async with connect(whole.gateway) as channel:
        ingest = ingest_pb2_grpc.IngestServiceStub(channel)
        jobs = await submit(ingest, range(first, first + JOBS))
        killed = [(name, whole.kill(name)) for name in victims]
        for name, pid in killed:
            await asyncio.to_thread(whole.wait_until_restarted, name, pid)
        await every_job_ended_with_its_one_result(channel, jobs)


async def test_mongod_dies_and_nothing_acknowledged_is_lost(whole: Any) -> None:
    async with connect(whole.gateway) as channel:
        jobs = await submit(ingest_pb2_grpc.IngestServiceStub(channel), range(5_000_000, 5_000_060))
        old = whole.kill("mongod")
        await asyncio.to_thread(whole.wait_until_restarted, "mongod", old)
        await every_job_ended_with_its_one_result(channel, jobs)


async def test_envoy_dies_and_a_client_of_ours_does_not_notice(whole: Any) -> None:
    import shoal

    # More patience than the default: on a busy machine an Envoy may take half a minute to start.
    async with shoal.Client(whole.gateway, retry=shoal.RetryPolicy(attempts=40)) as client:
        old = whole.pids()["envoy"]
        for number in range(200):
            if number == 50:
                whole.kill("envoy")
            answer = await client.infer("double", {"x": np.full((1, 4), number, np.float32)}, timeout=60)
            assert answer.outputs["y"].tolist() == [[2.0 * number] * 4]
        await asyncio.to_thread(whole.wait_until_restarted, "envoy", old)
