"""The coord service as a process: membership, leader, drains, health and reflection over gRPC."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mesh.cluster import membership
from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import ReadyModel, Registration, State
from mesh.process.config import ServiceConfig
from mesh.rpc.channel import connect
from services.coord.traffic import COORD, PUBLIC
from shoal.coord.v1 import coord_pb2 as pb
from tests.breakable import EtcdProcess, until
from tests.coord.conftest import Coord

pytestmark = pytest.mark.etcd


@asynccontextmanager
async def registered(etcd: str, instance: str = "infer-0", node: str = "local", state: State = State.READY):
    config = ServiceConfig(instance=instance, node=node, listen="unix:/tmp/x.sock", etcd=etcd, notice_ms=0)
    service = instance.rpartition("-")[0]
    async with Registration.of(config, service, f"unix:/tmp/{instance}.sock") as registration:
        await registration.update(state=state, models=[ReadyModel("m", (1, 2))] if service == "infer" else ())
        yield registration


async def listed(stub, service: str = "") -> dict[str, pb.Instance]:
    response = await stub.ListInstances(pb.ListInstancesRequest(service=service))
    return {instance.name: instance for instance in response.instances}


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def has_leader(stub) -> bool:
    try:
        await stub.GetLeader(pb.GetLeaderRequest())
    except grpc.aio.AioRpcError as err:
        if err.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return True


@pytest.fixture(autouse=True)
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of instances that this process registers: it may stand still for longer than the 3 s of a lease."""
    monkeypatch.setattr(membership, "TTL_S", 600)


@pytest.fixture(scope="module")
def shared_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coord]:
    """A coord replica and its etcd, for the tests that break neither."""
    with EtcdProcess(tmp_path_factory.mktemp("etcd")) as etcd, tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        asyncio.run(etcd.until_ready())
        with Coord(Path(folder), 0, etcd.address) as replica:
            asyncio.run(replica.until_ready())
            yield replica


@pytest.fixture
async def replica(shared_replica: Coord, stub_of) -> Coord:
    """The same replica, which leads, and which knows no instance of another test."""
    stub = await stub_of(shared_replica)

    async def is_alone() -> bool:
        return list(await listed(stub)) == ["local/coord-0"]

    await until(is_alone, "only coord is registered")
    await until(lambda: has_leader(stub), "it leads")
    return shared_replica


async def test_instances_are_listed_and_watched(replica, stub_of):
    stub = await stub_of(replica)
    async with registered(replica.etcd) as registration:
        await until(lambda: has(stub, "local/infer-0", "local/coord-0"))
        infer = (await listed(stub))["local/infer-0"]
        assert infer.service == "infer"
        assert infer.state == pb.INSTANCE_STATE_READY
        assert infer.pid == registration.instance.pid
        assert infer.address == "unix:/tmp/infer-0.sock"
        assert [(m.name, list(m.versions)) for m in infer.models] == [("m", [1, 2])]
        assert abs(infer.started_at.ToNanoseconds() / 1e9 - registration.instance.started_at) < 1e-3
        assert list(await listed(stub, "coord")) == ["local/coord-0"]
        assert await listed(stub, "nonesuch") == {}

        call = stub.WatchInstances(pb.WatchInstancesRequest(service="infer"))
        first = await call.read()
        assert [i.name for i in first.instances] == ["local/infer-0"]
        assert not first.stale
        await registration.update(state=State.DRAINING)
        second = await call.read()
        assert [i.state for i in second.instances] == [pb.INSTANCE_STATE_DRAINING]
        assert second.revision > first.revision
        call.cancel()
    await until(lambda: gone(stub, "local/infer-0"))


async def has(stub, *names: str) -> bool:
    return set(names) <= set(await listed(stub))


async def gone(stub, name: str) -> bool:
    return name not in await listed(stub)


async def test_drain_and_undrain(replica, stub_of):
    stub = await stub_of(replica)
    async with registered(replica.etcd), registered(replica.etcd, node="far"):
        await until(lambda: has(stub, "local/infer-0", "far/infer-0"))
        answer = await stub.DrainInstance(pb.DrainInstanceRequest(name="local/infer-0"))
        assert answer.instance.drained_by_operator
        assert answer.instance.state == pb.INSTANCE_STATE_DRAINING
        there = await listed(stub)
        assert there["local/infer-0"].drained_by_operator
        assert not there["far/infer-0"].drained_by_operator
        await stub.DrainInstance(pb.DrainInstanceRequest(name="local/infer-0"))

        back = await stub.UndrainInstance(pb.UndrainInstanceRequest(name="local/infer-0"))
        assert not back.instance.drained_by_operator
        assert (await listed(stub))["local/infer-0"].state == pb.INSTANCE_STATE_READY
        await stub.UndrainInstance(pb.UndrainInstanceRequest(name="local/infer-0"))

        short = await stub.DrainInstance(pb.DrainInstanceRequest(name="coord-0"))
        assert short.instance.name == "local/coord-0"
        await stub.UndrainInstance(pb.UndrainInstanceRequest(name="coord-0"))

        code, text = await refusal(stub.DrainInstance(pb.DrainInstanceRequest(name="infer-0")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "far/infer-0" in text
        for name, expected in [("infer-7", grpc.StatusCode.NOT_FOUND), ("", grpc.StatusCode.INVALID_ARGUMENT)]:
            assert (await refusal(stub.DrainInstance(pb.DrainInstanceRequest(name=name))))[0] is expected
            assert (await refusal(stub.UndrainInstance(pb.UndrainInstanceRequest(name=name))))[0] is expected


async def test_a_new_process_is_not_drained_and_the_leader_clears_the_mark(replica, stub_of):
    stub = await stub_of(replica)
    async with registered(replica.etcd):
        await until(lambda: has(stub, "local/infer-0"))
        await stub.DrainInstance(pb.DrainInstanceRequest(name="infer-0"))
    async with registered(replica.etcd) as new_process, Etcd(replica.etcd) as etcd:

        async def undrained() -> bool:
            found = (await listed(stub)).get("local/infer-0")
            if found is None or found.drained_by_operator:
                return False
            return abs(found.started_at.ToNanoseconds() / 1e9 - new_process.instance.started_at) < 1e-3

        await until(undrained, "the new process is listed, and not drained")

        async def cleared() -> bool:
            return not (await etcd.list(b"/shoal/drains/")).entries

        await until(cleared, "the mark cleared")


async def test_one_replica_leads_and_another_follows_when_it_is_killed(coord, stub_of):
    replicas = {r.name: r for r in (coord(0), coord(1))}
    for replica in replicas.values():
        await replica.until_ready()
    stubs = {name: await stub_of(replica) for name, replica in replicas.items()}
    for stub in stubs.values():
        await until(lambda stub=stub: has_leader(stub))

    async def agree() -> bool:  # The leader first tells since when it is a candidate, then since when it leads.
        one, other = [await stub.GetLeader(pb.GetLeaderRequest()) for stub in stubs.values()]
        return one == other

    await until(agree, "the replicas tell the same")
    leader = await stubs["local/coord-0"].GetLeader(pb.GetLeaderRequest())
    assert leader.since.seconds > 0
    replicas[leader.instance].kill()
    (other,) = stubs.keys() - {leader.instance}

    async def succeeded() -> bool:
        return (
            await has_leader(stubs[other]) and (await stubs[other].GetLeader(pb.GetLeaderRequest())).instance == other
        )

    await until(succeeded, "succession")
    assert (await stubs[other].GetLeader(pb.GetLeaderRequest())).fencing_token > leader.fencing_token


async def test_it_starts_without_etcd_and_finds_it_later(run_dir, tmp_path, stub_of):
    with EtcdProcess(tmp_path) as etcd:
        etcd.kill()
        with Coord(run_dir, 0, etcd.address) as replica:
            await replica.until_ready()
            stub = await stub_of(replica)
            response = await stub.ListInstances(pb.ListInstancesRequest())
            assert response.stale
            assert not response.instances
            assert (await refusal(stub.GetLeader(pb.GetLeaderRequest())))[0] is grpc.StatusCode.UNAVAILABLE
            etcd.start()
            await until(lambda: has(stub, "local/coord-0"), "membership")
            await until(lambda: has_leader(stub), "a leader")


async def test_while_etcd_is_away_the_last_view_stands(coord, own_etcd, stub_of):
    replica = coord()
    await replica.until_ready()
    stub = await stub_of(replica)
    async with registered(own_etcd.address):
        await until(lambda: has(stub, "local/infer-0", "local/coord-0"))
        own_etcd.kill()

        async def stale() -> bool:
            return (await stub.ListInstances(pb.ListInstancesRequest())).stale

        await until(stale, "staleness")
        assert await has(stub, "local/infer-0", "local/coord-0")
        assert (await refusal(stub.GetLeader(pb.GetLeaderRequest())))[0] is grpc.StatusCode.UNAVAILABLE
        code, text = await refusal(stub.DrainInstance(pb.DrainInstanceRequest(name="infer-0")))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "etcd" in text
        own_etcd.start()
        await until(lambda: has_leader(stub), "a leader again")
        await stub.DrainInstance(pb.DrainInstanceRequest(name="infer-0"))


async def test_health_answers_for_every_public_service(replica):
    async with connect(f"unix:{replica.socket}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        assert await status("") == health_pb2.HealthCheckResponse.SERVING
        assert await status("inference.GRPCInferenceService") == health_pb2.HealthCheckResponse.NOT_SERVING
        code, text = await refusal(stub.Check(health_pb2.HealthCheckRequest(service="nonesuch")))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "inference.GRPCInferenceService" in text
        assert set((await stub.List(health_pb2.HealthListRequest())).statuses) == {"", *PUBLIC}

        watch = stub.Watch(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nonesuch"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        async with registered(replica.etcd):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        unknown.cancel()


async def test_reflection_lists_and_describes_every_public_service(replica):
    async with connect(f"unix:{replica.socket}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def asked(**question):
            async def questions():
                yield reflection_pb2.ServerReflectionRequest(**question)

            async with aclosing(stub.ServerReflectionInfo(questions()).__aiter__()) as answers:
                return await anext(answers)

        found = [s.name for s in (await asked(list_services="")).list_services_response.service]
        assert {*PUBLIC, "grpc.health.v1.Health"} <= set(found)
        assert len(found) == len(set(found))
        for name in PUBLIC:
            assert (await asked(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x0a\x7f"])
async def test_garbage_is_refused_and_nothing_dies(replica, garbage):
    async with connect(f"unix:{replica.socket}") as channel:
        for method in COORD.methods:
            path = f"/{COORD.full_name}/{method.name}"
            if method.server_streaming:
                call = channel.unary_stream(path)(garbage, timeout=30)
                code = (await refusal(call.read()))[0] if method.input_type.fields else grpc.StatusCode.OK
            else:
                code = (await refusal(channel.unary_unary(path)(garbage, timeout=30)))[0]
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL), method.name
        ads = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

        async def junk():
            yield garbage

        await refusal(channel.stream_stream(ads)(junk(), timeout=30).read())
        nameless = channel.stream_stream(ads)(iter([b""]), timeout=30)
        assert (await refusal(nameless.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT
    await replica.until_ready()


async def test_it_leaves_in_order(coord, own_etcd, stub_of):
    replica = coord()
    await replica.until_ready()
    stub = await stub_of(replica)
    await until(lambda: has_leader(stub))
    watch = stub.WatchInstances(pb.WatchInstancesRequest())
    await watch.read()
    assert await asyncio.to_thread(replica.terminate) == 0
    code = (await refusal(drained(watch)))[0]
    assert code is grpc.StatusCode.UNAVAILABLE
    async with Etcd(own_etcd.address) as etcd:
        assert not (await etcd.list(b"/shoal/")).entries
    assert not replica.socket.exists()


async def drained(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
