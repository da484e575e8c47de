"""Coord replicas, etcd and Envoy together: what traffic notices of an outage of each. Nothing, that is the promise."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.cluster import membership
from mesh.cluster.etcd import Etcd, Put
from mesh.cluster.membership import TTL_S, ReadyModel, Registration, State, encode
from mesh.process.config import ServiceConfig
from mesh.rpc.channel import connect
from shoal.coord.v1 import coord_pb2 as pb
from shoal.coord.v1 import coord_pb2_grpc
from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import inference_pb2_grpc as oip_grpc
from shoal.node.probes import health
from tests.breakable import PATIENCE_S, EnvoyProcess, EtcdProcess, Process, until
from tests.long_form import by_form

pytestmark = [pytest.mark.etcd, pytest.mark.envoy]

KEPT_S = 30
# On a busy machine a coord may miss etcd for a moment. After such an outage, it keeps all instances.
AFTER_AN_OUTAGE_S = 2.0 * KEPT_S
TINY = Path(__file__).parent.parent / "mesh" / "xds" / "tiny_infer.py"


class Node:
    """Two coord replicas and an Envoy, and inference servers that the test registers."""

    def __init__(self, folder: Path, etcd: EtcdProcess, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.etcd = etcd
        self.stack = stack
        self.replicas: dict[int, Process] = {}

    async def start(self, coord, **settings: str) -> None:
        self.coords = {c.name: c for c in (coord(0, **settings), coord(1, **settings))}
        sockets = [c.socket for c in self.coords.values()]
        self.envoy = self.stack.enter_context(EnvoyProcess(self.folder, sockets))
        channel = await self.stack.enter_async_context(connect(self.envoy.gateway))
        self.infer = oip_grpc.GRPCInferenceServiceStub(channel)
        self.coord = coord_pb2_grpc.CoordServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        await self.envoy.until_ready()

    async def replica(self, number: int) -> Registration:
        registration = await self.unregistered(number)
        await self.stack.enter_async_context(registration)
        await registration.update(state=State.READY, models=[ReadyModel("a", (1,))])
        return registration

    async def unregistered(self, number: int) -> Registration:
        """Start the server of a replica, and return its registration, which has not begun."""
        socket = self.folder / f"infer-{number}.sock"
        argv = [sys.executable, str(TINY), str(socket), f"infer-{number}"]
        process = Process(argv, self.folder / f"infer-{number}.log")
        self.replicas[number] = self.stack.enter_context(process)
        await until(lambda: health(f"unix:{socket}"), f"infer-{number} ready")
        config = ServiceConfig(
            instance=f"infer-{number}", listen=f"unix:{socket}", etcd=self.etcd.address, notice_ms=100
        )
        return Registration.of(config, "infer", f"unix:{socket}")

    async def until_its_lease_ends(self, registration: Registration) -> None:
        """Register under a lease that nobody refreshes, as of a process that stands still, and wait for its end."""
        lost = replace(registration.instance, state=State.READY, models=(ReadyModel("a", (1,)),))
        async with Etcd(self.etcd.address) as etcd:
            lease = await etcd.grant(TTL_S)
            await etcd.transact([], [Put(lost.key, encode(lost), lease.id)])
            await self.registered(lost.name)
            await self.registered(lost.name, is_so=False)

    async def registered(self, name: str, *, is_so: bool = True) -> None:
        """Wait until both coords know the instance, or that it is gone."""

        async def known() -> bool:
            found = []
            for coord in self.coords.values():
                async with connect(f"unix:{coord.socket}") as channel:
                    stub = coord_pb2_grpc.CoordServiceStub(channel)
                    listed = await stub.ListInstances(pb.ListInstancesRequest(), timeout=30)
                    found.append(name in {instance.name for instance in listed.instances})
            return found == [is_so, is_so]

        await until(known, f"{name} is {'' if is_so else 'not '}registered")

    async def no_answer(self) -> bool:
        try:
            await self.answer()
        except grpc.aio.AioRpcError as err:
            return "no healthy upstream" in err.details()
        return False

    async def answer(self) -> str:
        """Who answers one call."""
        response = await self.infer.ModelInfer(oip.ModelInferRequest(model_name="a"), timeout=PATIENCE_S)
        return response.parameters["replica"].string_param

    async def answers_from(self, *expected: str, within_s: float = PATIENCE_S) -> None:
        """Waits until calls are answered by exactly these."""

        async def so() -> bool:
            found = set()
            for _ in range(20):
                try:
                    found.add(await self.answer())
                except grpc.aio.AioRpcError:
                    return False
            return found == set(expected)

        await until(so, f"answers from {expected}", within_s)

    @asynccontextmanager
    async def load(self, pause_s: float = 0.005) -> AsyncIterator[Counter]:
        """Make steady calls from 8 tasks while the block lasts; none may fail."""
        answered: Counter[str] = Counter()
        errors: list[str] = []
        stop = asyncio.Event()

        async def calls() -> None:
            while not stop.is_set():
                try:
                    answered[await self.answer()] += 1
                    await asyncio.sleep(pause_s)
                except grpc.aio.AioRpcError as err:
                    errors.append(f"{err.code()}: {err.details()}")

        running = [asyncio.create_task(calls()) for _ in range(8)]
        try:
            yield answered
        finally:
            stop.set()
            await asyncio.gather(*running)
        assert errors == []
        assert answered

    async def leader(self) -> str | None:
        try:
            return (await self.coord.GetLeader(pb.GetLeaderRequest(), timeout=30)).instance
        except grpc.aio.AioRpcError:
            return None

    async def until_led(self) -> str:
        """Wait for a leader, and return its name."""
        found: str | None = None

        async def is_led() -> bool:
            nonlocal found
            found = await self.leader()
            return bool(found)

        await until(is_led, "a leader")
        assert found is not None
        return found


@pytest.fixture
async def node(run_dir: Path, own_etcd: EtcdProcess, coord) -> AsyncIterator[Node]:
    async with AsyncExitStack() as stack:
        made = Node(run_dir, own_etcd, stack)
        await made.start(coord)
        yield made


@pytest.fixture
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of the replicas, which this process renews: it may stand still for longer than the 3 s of a lease.

    Those of the coords, which are processes of their own, are as ever.
    """
    monkeypatch.setattr(membership, "TTL_S", 600)


@pytest.fixture
async def keeping(run_dir: Path, own_etcd: EtcdProcess, coord) -> AsyncIterator[Node]:
    """A node that keeps lost instances for a long time."""
    async with AsyncExitStack() as stack:
        made = Node(run_dir, own_etcd, stack)
        await made.start(coord, SETTLE_MS=str(KEPT_S * 1000))
        yield made


@pytest.mark.usefixtures("long_leases")
async def test_instances_come_to_envoy_are_drained_and_put_back(node: Node):
    await node.replica(0)
    two = await node.replica(1)
    await node.answers_from("infer-0", "infer-1")
    async with node.load():
        await node.coord.DrainInstance(pb.DrainInstanceRequest(name="infer-0"), timeout=30)
        await node.answers_from("infer-1")
        await node.coord.UndrainInstance(pb.UndrainInstanceRequest(name="infer-0"), timeout=30)
        await node.answers_from("infer-0", "infer-1")
        await two.update(state=State.STARTING)
        await node.answers_from("infer-0")
        await two.update(state=State.READY)
        await node.answers_from("infer-0", "infer-1")

    status = await node.coord.GetMeshStatus(pb.GetMeshStatusRequest(), timeout=30)
    assert status.coord in node.coords
    found = {}
    for coord in node.coords.values():
        async with connect(f"unix:{coord.socket}") as channel:
            stub = coord_pb2_grpc.CoordServiceStub(channel)
            for envoy in (await stub.GetMeshStatus(pb.GetMeshStatusRequest(), timeout=30)).envoys:
                found[envoy.node] = {resource.type: resource for resource in envoy.resources}
    assert list(found) == ["local"]
    assert {t: sorted(r.names) for t, r in found["local"].items()} == {
        "Cluster": ["coord", "infer", "ingest", "model/a", "store"],
        "ClusterLoadAssignment": ["coord", "infer", "ingest", "model/a", "store"],
        "Listener": ["gateway", "outbound"],
        "RouteConfiguration": ["gateway", "services"],
    }
    assert all(r.acked_version and not r.nack and r.at.seconds for r in found["local"].values())

    async def status_of(name: str) -> int:
        return (await node.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)).status

    assert await status_of("") == health_pb2.HealthCheckResponse.SERVING
    assert await status_of("inference.GRPCInferenceService") == health_pb2.HealthCheckResponse.SERVING
    assert await status_of("shoal.store.v1.StoreService") == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.usefixtures("long_leases")
async def test_traffic_does_not_notice_the_kill_of_the_leader_and_configuration_goes_on(node: Node):
    await node.replica(0)
    await node.answers_from("infer-0")
    leader = await node.until_led()
    async with node.load():
        node.coords[leader].kill()
        await node.replica(1)
        await node.answers_from("infer-0", "infer-1")

        async def succeeded() -> bool:
            return await node.leader() in node.coords.keys() - {leader}

        await until(succeeded, "a new leader")
        node.coords[leader].start()
        await node.coords[leader].until_ready()
        (other,) = node.coords.keys() - {leader}
        node.coords[other].kill()

        async def drained() -> bool:
            # Not a call that the mesh repeats: the caller does, until Envoy has the coord that came back.
            try:
                await node.coord.DrainInstance(pb.DrainInstanceRequest(name="infer-0"), timeout=30)
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(drained, "the drain")
        await node.answers_from("infer-1")


@pytest.mark.usefixtures("long_leases")
async def test_traffic_goes_on_while_every_coord_is_gone(node: Node):
    await node.replica(0)
    await node.replica(1)
    await node.answers_from("infer-0", "infer-1")
    async with node.load() as answered:
        for coord in node.coords.values():
            coord.kill()
        node.replicas[1].kill()
        before = answered["infer-0"]
        await until(lambda: answered["infer-0"] > before + 100, "calls without coord")
        for coord in node.coords.values():
            coord.start()
        node.replicas[1].start()
        await node.answers_from("infer-0", "infer-1")


# The short form has the frozen etcd on a whole node: tests/node/test_kills.py.
@pytest.mark.parametrize("outage", by_form(["killed"], ["frozen", "killed"]))
async def test_traffic_goes_on_while_etcd_is_away_for_ten_seconds(node: Node, outage: str):
    await node.replica(0)
    await node.replica(1)
    await node.answers_from("infer-0", "infer-1")
    # It lasts 16 s and more: 150 calls a second are enough to notice.
    async with node.load(pause_s=0.05):
        node.etcd.freeze() if outage == "frozen" else node.etcd.kill()
        since = time.monotonic()
        # A replica dies meanwhile: Envoy sees to it alone.
        node.replicas[0].kill()
        await node.answers_from("infer-1")
        node.replicas[0].start()
        await node.answers_from("infer-0", "infer-1")
        await until(lambda: time.monotonic() - since > 10)
        node.etcd.thaw() if outage == "frozen" else node.etcd.start()
        await until(node.leader, "a leader again")

        async def all_registered() -> bool:
            found = await node.coord.ListInstances(pb.ListInstancesRequest(), timeout=30)
            names = {i.name for i in found.instances if i.state == pb.INSTANCE_STATE_READY}
            return not found.stale and {"local/infer-0", "local/infer-1", *node.coords} <= names

        await until(all_registered, "everybody registered again")
        # Longer than coord keeps those that do not come back.
        settled = time.monotonic()
        await until(lambda: time.monotonic() - settled > 6)
        await node.coord.DrainInstance(pb.DrainInstanceRequest(name="infer-0"), timeout=30)
        await node.answers_from("infer-1")


@pytest.mark.usefixtures("long_leases")
async def test_replicas_that_have_all_lost_their_leases_serve_until_one_is_back(keeping: Node):
    zero, one = await keeping.unregistered(0), await keeping.unregistered(1)
    await asyncio.gather(keeping.until_its_lease_ends(zero), keeping.until_its_lease_ends(one))
    await keeping.answers_from("infer-0", "infer-1")
    async with keeping.load():
        await keeping.stack.enter_async_context(one)
        await one.update(state=State.READY, models=[ReadyModel("a", (1,))])
        await keeping.answers_from("infer-1", within_s=AFTER_AN_OUTAGE_S)


@pytest.mark.usefixtures("long_leases")
async def test_a_replica_that_loses_its_lease_alone_gets_no_more_calls(keeping: Node):
    await keeping.replica(1)
    zero = await keeping.unregistered(0)
    await keeping.answers_from("infer-1")
    async with keeping.load():
        await keeping.until_its_lease_ends(zero)
        await keeping.answers_from("infer-1", within_s=AFTER_AN_OUTAGE_S)


@pytest.mark.usefixtures("long_leases")
async def test_the_last_replica_gets_no_call_after_it_has_announced_its_end(keeping: Node):
    async with await keeping.unregistered(0) as last:
        await last.update(state=State.READY, models=[ReadyModel("a", (1,))])
        await keeping.answers_from("infer-0")
    # Its process lives on, so calls would be answered if its endpoint was kept.
    await until(keeping.no_answer, "no healthy upstream")
