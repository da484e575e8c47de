"""The inference server that the gateway shows: live, ready and statistics of all infer instances, by coord."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance, ReadyModel, State, decode, encode
from mesh.cluster.mirror import Copy
from mesh.rpc.server import Rpc, Server
from services.coord import inference
from services.coord.cluster import Cluster
from services.coord.inference import MeshInference, is_live, is_ready
from services.coord.rest import rest_app
from services.coord.statistics import merged
from shoal.errors import InvalidArgument, ResourceExhausted, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc
from shoal.tenant_header import TENANT_HEADER
from tests.breakable import PATIENCE_S
from tests.mesh.http1.raw import RawClient

S = pb.StatisticDuration
NO_HEADERS: Any = SimpleNamespace(invocation_metadata=lambda: ())


def infer(
    number: int = 0,
    *models: str,
    awaited: tuple[str, ...] | None = (),
    state: State = State.READY,
    address: str = "unix:/none",
    node: str = "local",
) -> Instance:
    ready = tuple(ReadyModel(name, (1,)) for name in models)
    return Instance("infer", node, f"infer-{number}", address, 10, state, 100.0, ready, awaited=awaited)


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        ([], False),
        ([infer(state=State.STARTING)], False),
        ([infer(state=State.DRAINING)], False),
        ([infer()], True),
        # The registry is not known yet.
        ([infer(awaited=None)], False),
        ([infer(awaited=None), infer(1, "a")], True),
        ([infer(0, "a"), infer(1, "b")], True),
        # Awaited here, and ready there.
        ([infer(0, "a", awaited=("b",)), infer(1, "b", awaited=("a",))], True),
        ([infer(0, "a", awaited=("b",)), infer(1, "a", awaited=("b",))], False),
        # An instance that starts counts for nothing.
        ([infer(0, "a", awaited=("b",)), infer(1, "b", state=State.STARTING)], False),
        ([infer(0, "a"), infer(1, awaited=("b",), state=State.STARTING)], True),
    ],
)
def test_the_server_is_ready_when_each_awaited_model_is_ready_somewhere(
    instances: list[Instance], expected: bool
) -> None:
    assert is_ready(Cluster(tuple(instances))) is expected


def test_the_server_is_live_while_an_instance_runs() -> None:
    assert is_live(Cluster((infer(state=State.STARTING),)))
    assert not is_live(Cluster((infer(state=State.DRAINING),)))
    assert not is_live(Cluster((infer(),), drained=frozenset({"local/infer-0"})))


@pytest.mark.parametrize("awaited", [(), ("a", "b"), None])
def test_awaited_models_are_part_of_the_registration(awaited: tuple[str, ...] | None) -> None:
    instance = infer(0, "c", awaited=awaited)
    assert decode(instance.key, encode(instance)) == instance


def stats(name: str, version: str = "1", count: int = 1, *, last: int = 5, sizes: tuple[int, ...] = (1,)) -> Any:
    """Statistics in which every number is `count`, except the latest inference."""
    duration = S(count=count, ns=10 * count)
    return pb.ModelStatistics(
        name=name,
        version=version,
        last_inference=last,
        inference_count=count,
        execution_count=count,
        inference_stats=pb.InferStatistics(success=duration, queue=duration, cache_hit=duration),
        batch_stats=[pb.InferBatchStatistics(batch_size=size, compute_infer=duration) for size in sizes],
        memory_usage=[pb.MemoryUsage(type="GPU", id=0, byte_size=count)],
        response_stats={"0": pb.InferResponseStatistics(success=duration)},
        scheduling=pb.SchedulingStatistics(shed=count),
    )


def test_statistics_are_summed_by_version_batch_size_device_and_key() -> None:
    one = [stats("a", "2", 1, last=7, sizes=(1, 4)), stats("b", "1", 1)]
    two = [stats("a", "2", 10, last=6, sizes=(2, 4)), stats("a", "10", 3)]
    two[0].memory_usage.add(type="GPU", id=1, byte_size=9)
    two[0].response_stats["1"].fail.count = 2
    response = merged([pb.ModelStatisticsResponse(model_stats=each) for each in (one, two)])
    assert [(s.name, s.version) for s in response.model_stats] == [("a", "2"), ("a", "10"), ("b", "1")]
    total = response.model_stats[0]
    assert (total.last_inference, total.inference_count, total.execution_count) == (7, 11, 11)
    assert total.inference_stats.success == total.inference_stats.cache_hit == S(count=11, ns=110)
    assert not total.inference_stats.fail.count
    found = {batch.batch_size: (batch.compute_infer.count, batch.compute_infer.ns) for batch in total.batch_stats}
    assert found == {1: (1, 10), 2: (10, 100), 4: (11, 110)}
    assert list(found) == [1, 2, 4]
    assert [(m.id, m.byte_size) for m in total.memory_usage] == [(0, 11), (1, 9)]
    assert total.response_stats["0"].success == S(count=11, ns=110)
    assert total.response_stats["1"].fail.count == 2
    assert total.scheduling.shed == 11
    assert response.model_stats[1] == stats("a", "10", 3)


class Replica(pb_grpc.GRPCInferenceServiceServicer):
    """An infer instance with statistics, or with an error in their place; it waits while it hangs."""

    def __init__(self, *models: pb.ModelStatistics) -> None:
        self.models = models
        self.works = asyncio.Event()
        self.works.set()

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        await self.works.wait()
        found = [each for each in self.models if request.name in ("", each.name)]
        if request.name and not found:
            raise InvalidArgument(f"requested model '{request.name}' is not available")
        return pb.ModelStatisticsResponse(model_stats=found)


def rpc_of(replica: Replica | MeshInference) -> Rpc:
    descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    return Rpc(descriptor, lambda server: pb_grpc.add_GRPCInferenceServiceServicer_to_server(replica, server))


Serve = Callable[..., Any]


@pytest.fixture
async def serve(run_dir: Path) -> AsyncIterator[Serve]:
    """Starts replicas, and returns coord's servicer over them and instances that are gone."""
    async with AsyncExitStack() as stack:

        async def start(*replicas: Replica | None, **of: Any) -> MeshInference:
            entries = {}
            for number, replica in enumerate(replicas):
                instance = infer(number, address=f"unix:{run_dir}/infer-{number}.sock", **of)
                entries[instance.key] = Entry(instance.key, encode(instance), 1, 1, 0)
                if replica is not None:
                    server = Server(instance.address, [rpc_of(replica)], drain_ms=0)
                    await (await stack.enter_async_context(server)).serve()
            mirror: Any = SimpleNamespace(copy=Copy(entries, 1, False))
            return MeshInference(mirror, "local")

        yield start


async def asked(mesh: MeshInference, name: str = "") -> list[tuple[str, int]]:
    response = await mesh.ModelStatistics(pb.ModelStatisticsRequest(name=name), NO_HEADERS)
    return [(each.name, each.inference_count) for each in response.model_stats]


async def test_statistics_cover_all_instances_and_models_of_one(serve: Serve) -> None:
    mesh = await serve(Replica(stats("a"), stats("b", count=2)), Replica(stats("a", count=10)), None)
    assert await asked(mesh, "a") == [("a", 11)]
    assert await asked(mesh, "b") == [("b", 2)]
    assert await asked(mesh) == [("a", 11), ("b", 2)]
    with pytest.raises(InvalidArgument, match="requested model 'c' is not available"):
        await asked(mesh, "c")


async def test_an_instance_that_hangs_makes_the_statistics_unavailable_instead_of_wrong(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "REPLICA_S", 2.0)
    hanging = Replica(stats("a"))
    hanging.works.clear()
    mesh = await serve(Replica(stats("a")), hanging)
    with pytest.raises(Unavailable, match=r"local/infer-1 gave no statistics within 2 s"):
        await asked(mesh, "a")
    hanging.works.set()
    monkeypatch.setattr(inference, "REPLICA_S", 30.0)
    assert await asked(mesh, "a") == [("a", 2)]


async def test_without_an_instance_that_responds_there_are_no_statistics(serve: Serve) -> None:
    for replicas, state in (((), State.READY), ((None,), State.READY), ((Replica(),), State.STARTING)):
        mesh = await serve(*replicas, state=state)
        with pytest.raises(Unavailable, match="no infer instance responds"):
            await asked(mesh)


async def test_instances_of_other_nodes_are_not_asked(serve: Serve) -> None:
    with pytest.raises(Unavailable):
        await asked(await serve(Replica(stats("a")), node="other"))


async def test_statistics_of_too_many_models_are_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [stats(f"m{number}", sizes=(1, 2, 3)) for number in range(200)]
    mesh = await serve(Replica(*many), Replica(*many))
    assert await asked(mesh) == [(f"m{number}", 2) for number in sorted(range(200), key=str)]
    monkeypatch.setattr(inference, "MOST_BYTES", 10_000)
    with pytest.raises(ResourceExhausted, match="request those of one model"):
        await asked(mesh)
    assert await asked(mesh, "m7") == [("m7", 2)]


async def test_many_calls_of_one_tenant_do_not_delay_another_tenants(serve: Serve) -> None:
    replica = Replica(stats("a"))
    mesh = await serve(replica)
    replica.works.clear()
    order: list[str] = []

    async def ask(tenant: str) -> None:
        context: Any = SimpleNamespace(invocation_metadata=lambda: ((TENANT_HEADER, tenant),))
        await mesh.ModelStatistics(pb.ModelStatisticsRequest(), context)
        order.append(tenant)

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        for tenant in ("many",) * 20 + ("other",):
            tasks.create_task(ask(tenant))
        await asyncio.sleep(0)
        replica.works.set()
    # Two are asked for when it comes, and one more has its turn before.
    assert order.index("other") <= 3


async def test_over_rest_health_and_statistics_are_those_of_all_instances(serve: Serve, run_dir: Path) -> None:
    mesh = await serve(Replica(stats("a"), stats("b", count=2)), Replica(stats("a", count=10)))
    async with Server(f"unix:{run_dir}/coord.sock", [rpc_of(mesh)], drain_ms=0, http=rest_app) as server:

        async def get(path: str) -> tuple[int, Any]:
            async with await RawClient.connect(server.address) as client:
                response = await client.request("GET", path)
            return response.status, json.loads(response.body or b"null")

        async def counts(path: str) -> list[tuple[str, int]]:
            status, found = await get(path)
            assert (status, found.keys()) == (200, {"model_stats"})
            return [(each["name"], each["inference_count"]) for each in found["model_stats"]]

        assert await counts("/v2/models/stats") == [("a", 11), ("b", 2)]
        assert await counts("/v2/models/a/stats") == [("a", 11)]
        assert await counts("/v2/models/b/versions/1/stats") == [("b", 2)]
        status, found = await get("/v2/models/c/stats")
        assert (status, found) == (400, {"error": "requested model 'c' is not available"})
        assert await get("/v2/health/live") == (200, {"live": True})
        assert await get("/v2/health/ready") == (200, {"ready": True})
        mesh._mirror.copy = Copy({}, 1, False)
        assert await get("/v2/health/live") == (400, {"live": False})
        assert await get("/v2/health/ready") == (400, {"ready": False})
        assert (await get("/v2/models/stats"))[0] == 503
        assert (await get("/v2/models/a"))[0] == 404, "infer serves it"
