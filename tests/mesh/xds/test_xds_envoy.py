"""A real Envoy under our ADS server: routing by model, hostile input, large messages, and the kill of a replica.

One Envoy serves all tests. Each test starts with no instances, and starts the replicas that do not run.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from mesh.cluster.membership import Instance, ReadyModel, State
from mesh.process.watched import Watched
from mesh.rpc.channel import connect
from mesh.rpc.client.channel import Channel
from mesh.rpc.server import Rpc, Server
from mesh.xds.ads import AdsServer
from mesh.xds.messages import Cluster
from mesh.xds.resource import CLUSTER, pack
from mesh.xds.routes import NO_RETRY_HEADER, ServiceRoutes
from mesh.xds.snapshot import EnvoyNode, Snapshot, checked, snapshot
from mesh.xds.tracing import Tracing
from services.coord.traffic import COORD, table
from shoal.coord.v1 import coord_pb2, coord_pb2_grpc
from shoal.inference.v2 import bulk_pb2, bulk_pb2_grpc
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc
from shoal.node.envoy_overload import DEFAULT_HEAP_MB
from shoal.node.probes import health
from tests.breakable import EnvoyProcess, Process, until
from tests.http2 import INFER, Answer, Connection, framed
from tests.long_form import by_form

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

TINY = Path(__file__).with_name("tiny_infer.py")
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
TABLE = replace(table(), services=(*table().services, ServiceRoutes("/nobody.v1.", "nobody")))


class Changing:
    """Snapshots of instances that the test sets."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.instances: Watched[tuple[Instance, ...]] = Watched(())
        self.drained: frozenset[str] = frozenset()
        self.extra: tuple = ()
        self.tracing = tracing

    async def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        async for instances in self.instances.follow():
            shot = snapshot(instances, self.drained, node, TABLE, self.tracing)
            yield checked([*(r for of_type in shot.resources.values() for r in of_type.values()), *self.extra])


class Mesh:
    """An Envoy, its ADS server, and tiny inference servers."""

    def __init__(
        self, folder: Path, stack: AsyncExitStack, tracing: Tracing | None, heap: int = DEFAULT_HEAP_MB << 20
    ) -> None:
        self.heap = heap
        self.folder = folder
        self.stack = stack
        self.source = Changing(tracing)
        self.ads = AdsServer(self.source)
        self.replicas: dict[int, Process] = {}

    async def start(self) -> None:
        self.coord = self.folder / "coord-0.sock"
        server = Server(f"unix:{self.coord}", [], drain_ms=0, methods=self.ads.methods())
        await (await self.stack.enter_async_context(server)).serve()
        self.envoy = self.stack.enter_context(EnvoyProcess(self.folder, [self.coord], heap=self.heap))
        self.channel = await self.stack.enter_async_context(connect(self.envoy.gateway))
        self.stub = pb_grpc.GRPCInferenceServiceStub(self.channel)

    async def replica(self, number: int) -> Process:
        """Return the running inference server `infer-<number>`; membership does not know it yet."""
        if number in self.replicas and self.replicas[number].is_running():
            return self.replicas[number]
        socket = self.folder / f"infer-{number}.sock"
        argv = [sys.executable, str(TINY), str(socket), f"infer-{number}"]
        process = self.stack.enter_context(Process(argv, self.folder / f"infer-{number}.log"))
        await until(lambda: health(f"unix:{socket}"), f"infer-{number} ready")
        self.replicas[number] = process
        return process

    def instance(self, number: int, *models: str, state: State = State.READY, steps: str = "") -> Instance:
        """`steps`: the model, of these, that has sequences."""
        ready = tuple(ReadyModel(model, (1,), model == steps) for model in models)
        address = f"unix:{self.folder}/infer-{number}.sock"
        return Instance("infer", "local", f"infer-{number}", address, number, state, 1.0, ready)

    async def show(self, *instances: Instance) -> None:
        """Makes these the members, and waits until Envoy has all of it."""
        self.source.instances.set(instances)
        await self.envoy.until_ready()
        there_are = [i for i in instances if i.state is not State.STARTING]
        healthy = {i.address.removeprefix("unix:") for i in instances if i.state is State.READY}
        wanted = {f"model/{m.name}" for i in there_are for m in i.models}
        apart = {f"model/{m.name}" for i in there_are for m in i.models if any(m not in o.models for o in there_are)}
        apart |= {f"model/{m.name}" for i in there_are for m in i.models if m.has_sequences}
        endpoints = {i.address.removeprefix("unix:") for i in instances if i.state is not State.STARTING}

        async def has_all() -> bool:
            clusters = await self.envoy.admin_get("/clusters")
            there = {name for name in wanted if f"{name}::" in clusters}
            known = {line.split("::")[1] for line in clusters.splitlines() if line.startswith("infer::/")}
            passed = {path for path in healthy if f"infer::{path}::health_flags::healthy" in clusters}
            idle = all(not s.in_flight for stream in self.ads._streams for s in stream.session._types.values())
            is_there = there == wanted and known == endpoints and passed == healthy and idle
            return is_there and await self._routes_ready(apart, wanted - apart)

        await until(has_all, "Envoy has the snapshot")

    async def hide_all(self) -> None:
        """Make no instance a member, and wait until Envoy has forgotten those that were."""
        self.source.extra = ()
        self.source.instances.set(())

        async def is_empty() -> bool:
            lines = (await self.envoy.admin_get("/clusters")).splitlines()
            return not any(line.startswith(("model/", "infer::/")) for line in lines)

        await until(is_empty, "Envoy has forgotten all instances")

    async def _routes_ready(self, apart: set[str], everywhere: set[str]) -> bool:
        dump = await self.envoy.admin_get("/config_dump?resource=dynamic_route_configs")
        return all(f'"{name}"' in dump for name in apart) and not any(f'"{name}"' in dump for name in everywhere)

    async def infer(self, model: str, size: int = 0, **kwargs) -> pb.ModelInferResponse:
        timeout = kwargs.pop("timeout", 30)
        metadata = kwargs.pop("metadata", None)
        compression = kwargs.pop("compression", None)
        return await self.stub.ModelInfer(
            request(model, size, **kwargs), timeout=timeout, metadata=metadata, compression=compression
        )


def request(model: str, size: int = 0, **parameters: int | str) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model)
    if size:
        message.raw_input_contents.append(b"x" * size)
    for key, value in parameters.items():
        if isinstance(value, int):
            message.parameters[key].int64_param = value
        else:
            message.parameters[key].string_param = value
    return message


def told(response: pb.ModelInferResponse, key: str) -> str:
    return response.parameters[key].string_param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_mesh() -> AsyncIterator[Mesh]:
    # Paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = Mesh(folder, stack, None)
        await made.start()
        await made.envoy.until_ready()
        yield made
    shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(shared_mesh: Mesh) -> Mesh:
    await shared_mesh.hide_all()
    return shared_mesh


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_unmodified_clients_are_routed_by_the_model_in_their_message(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    for _ in range(4):
        for model, replica in [("a", "infer-0"), ("b", "infer-1")]:
            response = await mesh.infer(model)
            assert (told(response, "replica"), told(response, "header")) == (replica, model)
    # The other calls that name a model, in a field of another name.
    assert (await mesh.stub.ModelReady(pb.ModelReadyRequest(name="b"))).ready
    assert (await mesh.stub.ModelMetadata(pb.ModelMetadataRequest(name="a"))).platform == "a"
    # No instance has it, or its name is no header's: any instance may say so.
    for model in ("c", "", "we ird", "x" * 300, "üñï", 'a"\n'):
        assert told(await mesh.infer(model), "replica") in ("infer-0", "infer-1")


async def test_services_are_routed_likewise_at_the_outbound_socket(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    assert mesh.envoy.outbound.stat().st_mode & 0o777 == 0o600
    async with connect(f"unix:{mesh.envoy.outbound}") as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(3):
            assert told(await stub.ModelInfer(request("b")), "replica") == "infer-1"


async def test_no_call_fails_while_instances_get_a_model_one_after_the_other(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "a"))
    ended: list[str] = []

    async def keep_calling() -> None:
        while True:
            ended.append(told(await mesh.infer("a"), "replica"))

    calling = [asyncio.create_task(keep_calling()) for _ in range(4)]
    for _ in range(3):
        await mesh.show(mesh.instance(0, "a", "b"), mesh.instance(1, "a"))
        assert told(await mesh.infer("b"), "replica") == "infer-0"
        await mesh.show(mesh.instance(0, "a", "b"), mesh.instance(1, "a", "b"))
        await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "a"))
    assert not any(task.done() for task in calling), "a call failed"
    for task in calling:
        task.cancel()
    await asyncio.wait(calling)
    assert set(ended) == {"infer-0", "infer-1"}


async def test_a_client_cannot_choose_the_model_route_itself(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    response = await mesh.infer("a", metadata=(("x-shoal-model", "b"),))
    assert (told(response, "replica"), told(response, "header")) == ("infer-0", "a")
    response = await mesh.infer("", metadata=(("x-shoal-model", "b"),))
    assert told(response, "header") == ""


async def test_bulks_of_services_go_to_the_model_that_their_header_names(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    async with connect(f"unix:{mesh.folder}/outbound.sock") as channel:
        stub = bulk_pb2_grpc.BulkInferenceStub(channel)
        for model, replica in (("a", "infer-0"), ("b", "infer-1")):
            call = stub.InferBulk(timeout=30, metadata=(("x-shoal-model", model),))
            await call.write(bulk_pb2.InferBulkRequest(entries=[{"number": 7, "request": b"x"}]))
            first = await call.read()  # Before the request has ended: it is not held back.
            assert (first.instance, first.answers[0].message) == (replica, model)
            await call.write(bulk_pb2.InferBulkRequest(given_up=[7]))
            assert (await call.read()).answers[0].number == 7
            await call.done_writing()
            assert await call.read() == grpc.aio.EOF
    # Without it there is no way; at the gateway clients have no such door, whatever they say. (By the lean client: grpc
    # may lose the status of a stream that ends before its first message has gone.)
    path, header = "/shoal.inference.v2.BulkInference/InferBulk", [("x-shoal-model", "a")]
    for address, metadata in ((f"unix:{mesh.envoy.outbound}", []), (mesh.envoy.gateway, header)):
        async with Channel(address) as channel, channel.stream(path, timeout_s=30, metadata=metadata) as call:
            call.write(b"")
            assert (await refusal(anext(call)))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_streams_are_routed_by_their_first_message(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    call = mesh.stub.ModelStreamInfer(timeout=30)
    for model in ("b", "a", "b"):
        await call.write(request(model))
        response = (await call.read()).infer_response
        assert (told(response, "replica"), response.model_name) == ("infer-1", model)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


def step(model: str, sequence: int | str, kind: str = "") -> pb.ModelInferRequest:
    message = request(model, size=100, timeout=5, zzz="after", aaa="before")
    kind = kind or ("string_param" if isinstance(sequence, str) else "int64_param")
    setattr(message.parameters["sequence_id"], kind, sequence)
    message.parameters["sequence_start"].bool_param = True
    return message


async def test_steps_of_a_sequence_go_to_one_replica(mesh: Mesh):
    for number in range(3):
        await mesh.replica(number)
    await mesh.show(*(mesh.instance(number, "s", "a", steps="s") for number in range(3)))
    ids = [*range(1, 25), 2**63 - 1, "text", "käse", "x" * 128, "\n", "a\0b"]
    homes = {}
    for sequence in ids:
        seen = {told(await mesh.stub.ModelInfer(step("s", sequence)), "replica") for _ in range(4)}
        assert len(seen) == 1, f"{sequence!r} went to {seen}"
        homes[sequence] = seen.pop()
    assert set(homes.values()) == {"infer-0", "infer-1", "infer-2"}, "they are spread"
    # The same number is the same sequence, in whatever field it comes; a text that looks like it is another one.
    for sequence in range(1, 10):
        response = await mesh.stub.ModelInfer(step("s", sequence, "uint64_param"))
        assert told(response, "replica") == homes[sequence]
        assert told(response, "sequence") != told(await mesh.stub.ModelInfer(step("s", str(sequence))), "sequence")
    call = mesh.stub.ModelStreamInfer(timeout=30)
    await call.write(step("s", 7))
    assert told((await call.read()).infer_response, "replica") == homes[7]
    await call.done_writing()
    # Other models are as free as ever.
    assert {told(await mesh.stub.ModelInfer(request("a")), "replica") for _ in range(30)} == set(homes.values())


async def test_a_client_cannot_choose_the_sequence_route_itself(mesh: Mesh):
    await mesh.replica(0)
    await mesh.show(mesh.instance(0, "s", steps="s"))
    response = await mesh.infer("s", metadata=(("x-shoal-sequence", "17"),))
    assert told(response, "sequence") == ""


async def test_a_step_that_reached_its_replica_is_not_carried_to_another(mesh: Mesh):
    replicas = [await mesh.replica(number) for number in range(2)]
    await mesh.show(*(mesh.instance(number, "s", steps="s") for number in range(2)))
    asked = step("s", 5)
    home = int(told(await mesh.stub.ModelInfer(asked), "replica").removeprefix("infer-"))
    asked.parameters["sleep_ms"].int64_param = 20_000
    running = asyncio.ensure_future(mesh.stub.ModelInfer(asked, timeout=30))
    await until(lambda: mesh.envoy.admin_get("/clusters"), "Envoy answers")

    async def is_there() -> bool:
        lines = (await mesh.envoy.admin_get("/clusters")).splitlines()
        return any(f"infer-{home}.sock::rq_active::1" in line and line.startswith("model/s") for line in lines)

    await until(is_there, "the step is at its replica")
    replicas[home].kill()
    code, _ = await refusal(running)
    assert code is grpc.StatusCode.UNAVAILABLE
    # The next ones find the other, though Envoy still counts on the first.
    del asked.parameters["sleep_ms"]
    for _ in range(20):
        response = await mesh.stub.ModelInfer(asked, timeout=30)
        assert told(response, "replica") == f"infer-{1 - home}"


async def test_sequences_find_the_only_replica_of_three_that_is_left(mesh: Mesh):
    """Envoy ejects one of two dead replicas, and still counts on the other: the home of a third of the sequences."""
    replicas = [await mesh.replica(number) for number in range(3)]
    await mesh.show(*(mesh.instance(number, "s", steps="s") for number in range(3)))
    for replica in replicas[:2]:
        replica.kill()
    for sequence in range(1, 501):
        response = await mesh.stub.ModelInfer(step("s", sequence), timeout=30)
        assert told(response, "replica") == "infer-2"


async def test_clients_that_do_not_read_hold_up_nobody_else(mesh: Mesh):
    """All calls to an instance share one connection: what waits for some clients leaves it room for all others."""
    await mesh.replica(0)
    await mesh.show(mesh.instance(0, "a"))
    lazy = 4

    async def stalls() -> int:
        return sum((await mesh.envoy.stats("upstream_flow_control_paused_reading_total")).values())

    before = await stalls()

    async def are_stalled() -> bool:
        return await stalls() >= before + lazy

    async with AsyncExitStack() as stack:
        for _ in range(lazy):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(mesh.envoy.gateway, options=UNLIMITED))
            call = pb_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(timeout=120)
            await call.write(request("a", 24 << 20, echo=1))  # Its answer is never read.
        await until(are_stalled, "all answers have come as far as Envoy")
        for size in (0, 30 << 20):
            await until(lambda size=size: is_echoed(mesh, size), f"an answer of {size} bytes")


async def is_echoed(mesh: Mesh, size: int) -> bool:
    try:
        answer = await mesh.infer("a", size=size, echo=1, timeout=60)
    except grpc.aio.AioRpcError as err:
        # A replica on a busy machine may be too busy to answer its health checks.
        if err.details() != "no healthy upstream":
            raise
        return False
    assert sum(map(len, answer.raw_output_contents)) == size
    return told(answer, "replica") == "infer-0"


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_pass(mesh: Mesh, compression):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a", "b"), mesh.instance(1, "a"))
    response = await mesh.infer("a", size=100_000, compression=compression)
    assert response.parameters["bytes"].int64_param == 100_000


@pytest.mark.parametrize(
    ("megabytes", "is_apart"),
    by_form([(1, True), (3, False), (24, False), (100, True)], [*product((1, 3, 24, 100), (True, False))]),
)
async def test_large_messages_pass_and_come_back(mesh: Mesh, megabytes: int, is_apart: bool):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, *([] if is_apart else ["a"])))
    response = await mesh.infer("a", size=megabytes << 20, echo=1, timeout=60)
    assert told(response, "header") == ("a" if is_apart else ""), "calls are searched only where it matters"
    assert len(response.raw_output_contents[0]) == megabytes << 20


@pytest.mark.parametrize(
    ("megabytes", "expected"),
    [
        (150, grpc.StatusCode.RESOURCE_EXHAUSTED),  # The service's own refusal.
        (200, grpc.StatusCode.FAILED_PRECONDITION),  # More than Envoy holds to find the model's name.
    ],
)
async def test_messages_that_are_too_large_are_refused_and_nothing_dies(mesh: Mesh, megabytes: int, expected):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1))
    async with grpc.aio.insecure_channel(mesh.envoy.gateway, options=UNLIMITED) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        code, text = await refusal(stub.ModelInfer(request("a", megabytes << 20), timeout=60))
    assert code is expected
    assert text
    assert told(await mesh.infer("a"), "replica") == "infer-0"


async def test_garbage_gets_a_clear_status_and_no_hang(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1))
    path = "/inference.GRPCInferenceService/ModelInfer"
    for garbage in (b"\xff" * 100, b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", bytes(range(256))):
        code, text = await refusal(mesh.channel.unary_unary(path)(garbage, timeout=30))
        assert code is grpc.StatusCode.INVALID_ARGUMENT, garbage[:8]
        assert text

    async def nothing():
        return
        yield

    code, _ = await refusal(mesh.channel.stream_unary(path)(nothing(), timeout=30))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    unknown = mesh.channel.unary_unary("/inference.GRPCInferenceService/Nonesuch")(b"", timeout=30)
    assert (await refusal(unknown))[0] is grpc.StatusCode.UNIMPLEMENTED
    nowhere = mesh.channel.unary_unary("/no.such.Service/Method")(b"", timeout=30)
    assert (await refusal(nowhere))[0] is grpc.StatusCode.UNIMPLEMENTED
    nobody = mesh.channel.unary_unary("/nobody.v1.Service/Method")(b"", timeout=30)
    assert (await refusal(nobody))[0] is grpc.StatusCode.UNAVAILABLE
    assert told(await mesh.infer("a"), "replica") == "infer-0"


async def test_the_lean_client_hears_the_same_from_envoy(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    path = "/inference.GRPCInferenceService/ModelInfer"
    address = f"unix:{mesh.envoy.outbound}"
    async with connect(address) as theirs, Channel(address) as lean:
        for one, message in (
            (path, b"\xff\xff"),
            ("/inference.GRPCInferenceService/Nonesuch", b""),
            ("/no.such.Service/Method", b""),
            ("/nobody.v1.Service/Method", b""),
            ("/shoal.inference.v2.BulkInference/InferBulk", b""),
        ):
            heard = [await refusal(channel.unary_unary(one)(message, timeout=30)) for channel in (theirs, lean)]
            assert heard[0] == heard[1]
        stub = pb_grpc.GRPCInferenceServiceStub(lean)
        answers = await asyncio.gather(*(stub.ModelInfer(request("ab"[n % 2]), timeout=30) for n in range(1_000)))
        assert [told(answer, "replica") for answer in answers] == ["infer-0", "infer-1"] * 500
        large = await stub.ModelInfer(request("a", 16 << 20, echo=1), timeout=60)
        assert told(large, "replica") == "infer-0"
        under_way = asyncio.create_task(stub.ModelInfer(request("b", sleep_ms=60_000), timeout=60))
        await until_asked(mesh, "infer-1")
        mesh.replicas[1].kill()
        code, text = await refusal(under_way)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "reset reason: " in text
        assert not under_way.exception().is_unprocessed


async def until_asked(mesh: Mesh, name: str) -> None:
    """Until a replica has the one call that is under way."""

    async def is_there() -> bool:
        lines = (await mesh.envoy.admin_get("/clusters")).splitlines()
        return any(f"{name}.sock::rq_active::1" in line for line in lines)

    await until(is_there, f"the call is at {name}")


@pytest.mark.parametrize(
    ("by", "header", "is_retried"),
    [
        ("service", ("x-envoy-max-retries", "0"), False),
        ("client", ("x-envoy-max-retries", "0"), True),
        ("client", (NO_RETRY_HEADER, "1"), False),
    ],
)
async def test_envoys_header_against_retries_is_for_services_and_ours_for_clients(
    mesh: Mesh, by: str, header: tuple[str, str], is_retried: bool
):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    address = f"unix:{mesh.envoy.outbound}" if by == "service" else mesh.envoy.gateway
    retries = await mesh.envoy.stats("cluster.model/b.upstream_rq_retry$")
    before = sum(retries.values())
    async with Channel(address) as channel:
        call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        under_way = asyncio.create_task(call(request("b", sleep_ms=60_000), timeout=60, metadata=[header]))
        await until_asked(mesh, "infer-1")
        mesh.replicas[1].kill()
        code, text = await refusal(under_way)
    assert code is grpc.StatusCode.UNAVAILABLE
    retries = await mesh.envoy.stats("cluster.model/b.upstream_rq_retry$")
    assert list(retries) == ["cluster.model/b.upstream_rq_retry"]
    if is_retried:
        assert "retried and the latest reset reason" in text
        assert sum(retries.values()) > before
    else:
        assert text.endswith("reset reason: connection termination")
        assert sum(retries.values()) == before


async def test_a_path_that_is_no_text_reaches_nobody(mesh: Mesh):
    """No path may end a server."""
    replica = await mesh.replica(0)
    await mesh.show(mesh.instance(0, "a"))
    await mesh.infer("a")
    for path in (f"{INFER[:-1]}\xe9", f"{INFER}/\xff\xfe", "/inference.GRPCInferenceService/\x80"):
        with Connection(mesh.envoy.gateway) as connection:
            answer = await asyncio.to_thread(connection.call, framed(request("a").SerializeToString()), path)
        refused = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT)
        assert answer.status in [status.value[0] for status in refused], answer
        assert replica.is_running()
        await mesh.infer("a")


async def over_rest(mesh: Mesh, method: str, path: str, body: bytes | None) -> tuple[int | None, int | None]:
    """Make a call that is none of gRPC; return its status of HTTP, and the status of gRPC if it has one."""
    change = {":method": method, ":path": path.encode("latin-1"), "te": None, "content-type": None}

    def whole() -> Answer:
        with Connection(mesh.envoy.gateway) as connection:
            stream = connection.open(change=change, has_body=body is not None)
            connection.send(stream, body or b"", end=body is not None)
            return connection.answer(stream)

    answer = await asyncio.to_thread(whole)
    return answer.http_status, answer.status


@pytest.mark.parametrize("body", [None, b"", b"{}"])
async def test_a_path_over_rest_that_is_no_text_is_not_found(mesh: Mesh, body: bytes | None):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    for method, path in (
        ("GET", "/v2/health/ready?\xff"),
        ("HEAD", "/v2/health/ready?\xff"),
        ("GET", "/v2/models/\xe9"),
        ("POST", "/v2/models/\xe9/infer"),
        ("DELETE", "/shoal/v1/models/\xff"),
    ):
        assert await over_rest(mesh, method, path, body) == (404, None), (method, path)


@pytest.mark.parametrize("body", [None, b"", b"{}"])
async def test_a_call_of_a_grpc_path_that_is_not_grpc_gets_no_good_response(mesh: Mesh, body: bytes | None):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))
    status, _ = await over_rest(mesh, "POST", INFER, body)
    assert status in (404, 415)


async def test_a_caller_who_gives_up_often_keeps_the_connection(mesh: Mesh):
    await mesh.replica(0)
    await mesh.show(mesh.instance(0, "a"))
    await mesh.infer("a")
    message = framed(request("a").SerializeToString())

    def give_up() -> None:
        with Connection(mesh.envoy.gateway) as connection:
            for _ in range(700):
                stream = connection.open()
                connection.send(stream, message, end=True)
                connection.reset(stream)
            assert connection.call(message).status == 0

    await asyncio.to_thread(give_up)


async def test_envoy_obeys_the_callers_deadline_and_sets_none_of_its_own(mesh: Mesh):
    await mesh.replica(0)
    await mesh.show(mesh.instance(0, "a"))
    code, _ = await refusal(mesh.infer("a", sleep_ms=60_000, timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    # Longer than Envoy's default of 15 s.
    assert told(await mesh.infer("a", sleep_ms=15_500, timeout=40), "replica") == "infer-0"


async def test_statuses_of_the_service_pass_and_eject_nobody(mesh: Mesh):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "a"))
    for code in ("INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DATA_LOSS") * 3:
        got, text = await refusal(mesh.infer("a", fail=code))
        assert (got.name, text) == (code, "as you wished")
    replicas = {told(await mesh.infer("a"), "replica") for _ in range(40)}
    assert replicas == {"infer-0", "infer-1"}


async def test_a_killed_replica_under_load_costs_no_call(mesh: Mesh):
    """kill -9 of one of two, with two dozen calls in flight; membership hears nothing of it. Then it comes back."""
    await mesh.replica(0)
    await mesh.replica(1)
    both = (mesh.instance(0, "a"), mesh.instance(1, "a"))
    await mesh.show(*both)
    answered: dict[str, int] = {"infer-0": 0, "infer-1": 0}
    errors: list[str] = []
    stop = asyncio.Event()

    async def load(model: str) -> None:
        while not stop.is_set():
            try:
                answered[told(await mesh.infer(model, sleep_ms=20), "replica")] += 1
            except grpc.aio.AioRpcError as err:
                errors.append(f"{err.code()}: {err.details()}")

    # Half of them by model, half to any instance: both kinds of cluster are tried.
    tasks = [asyncio.create_task(load("a" if number % 2 else "")) for number in range(24)]
    try:
        for round in range(2):
            target = answered["infer-0"] + 30
            await until(lambda target=target: answered["infer-0"] >= target, f"calls on infer-0 in round {round}")
            mesh.replicas[0].kill()
            target = answered["infer-1"] + 200
            await until(lambda target=target: answered["infer-1"] >= target or errors, "calls on infer-1")
            mesh.replicas[0].start()
    finally:
        target = answered["infer-0"] + 30
        await until(lambda: answered["infer-0"] >= target or errors, "calls on infer-0 again")
        stop.set()
        await asyncio.gather(*tasks)
    assert errors == []


async def test_large_messages_survive_the_kill_of_a_replica(mesh: Mesh, tmp_path: Path):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "a"))
    gate = tmp_path / "gate"
    calls = [asyncio.create_task(mesh.infer("a", size=24 << 20, gate=str(gate), timeout=90)) for _ in range(4)]

    async def under_way() -> bool:
        stats = await mesh.envoy.stats("cluster.(model/a|infer).upstream_rq_active$")
        return sum(stats.values()) == 4

    await until(under_way, "calls under way")
    mesh.replicas[0].kill()
    gate.touch()
    assert {told(response, "replica") for response in await asyncio.gather(*calls)} == {"infer-1"}


async def test_a_frozen_replica_is_noticed(mesh: Mesh, tmp_path: Path):
    """It keeps its connections and answers nothing: pings cut them, and the calls go elsewhere."""
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "a"))
    gate = tmp_path / "gate"
    calls = [asyncio.create_task(mesh.infer("a", gate=str(gate), timeout=60)) for _ in range(8)]

    async def under_way() -> bool:
        return sum((await mesh.envoy.stats("cluster.(model/a|infer).upstream_rq_active$")).values()) == 8

    await until(under_way, "calls under way")
    mesh.replicas[0].freeze()
    gate.touch()
    try:
        assert {told(response, "replica") for response in await asyncio.gather(*calls)} == {"infer-1"}
    finally:
        mesh.replicas[0].kill()


async def test_a_drained_replica_gets_nothing_new_and_finishes_what_it_has(mesh: Mesh, tmp_path: Path):
    await mesh.replica(0)
    await mesh.replica(1)
    await mesh.show(mesh.instance(0, "a"))
    gate = tmp_path / "gate"
    long = asyncio.create_task(mesh.infer("a", gate=str(gate), timeout=60))

    async def under_way() -> bool:
        return sum((await mesh.envoy.stats("cluster.(model/a|infer).upstream_rq_active$")).values()) == 1

    await until(under_way, "the long call")
    await mesh.show(mesh.instance(0, "a", state=State.DRAINING), mesh.instance(1, "a"))
    assert "draining" in await mesh.envoy.admin_get("/clusters")
    for _ in range(30):
        assert told(await mesh.infer("a"), "replica") == "infer-1"
    gate.touch()
    assert told(await long, "replica") == "infer-0"
    # The only one there is drained: nobody is there, rather than the drained one after all.
    mesh.source.instances.set((mesh.instance(0, "a", state=State.DRAINING),))

    async def nobody() -> bool:
        try:
            await mesh.infer("a")
        except grpc.aio.AioRpcError as err:
            return err.code() is grpc.StatusCode.UNAVAILABLE
        return False

    await until(nobody, "nobody to call")


async def test_models_come_and_go_without_an_error(mesh: Mesh):
    """Routes to a new cluster wait for it; a cluster goes after its routes."""
    await mesh.replica(0)
    await mesh.show(mesh.instance(0))
    errors: list[str] = []
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            try:
                await mesh.infer("a")
            except grpc.aio.AioRpcError as err:
                errors.append(f"{err.code()}: {err.details()}")

    tasks = [asyncio.create_task(load()) for _ in range(8)]
    for _ in range(4):
        await mesh.show(mesh.instance(0, "a", "b"))
        await mesh.show(mesh.instance(0))
        await until(lambda: gone(mesh, "model/a"), "the cluster gone")
    stop.set()
    await asyncio.gather(*tasks)
    assert errors == []


async def gone(mesh: Mesh, cluster: str) -> bool:
    return f"{cluster}::" not in await mesh.envoy.admin_get("/clusters")


async def test_a_refused_resource_is_reported_and_its_neighbours_arrive(mesh: Mesh):
    await mesh.replica(0)
    broken = Cluster.from_dict({"name": "bad", "type": "STATIC", "connect_timeout": "0s"})
    mesh.source.extra = (pack(CLUSTER, "bad", broken),)
    await mesh.show(mesh.instance(0, "a"))
    assert told(await mesh.infer("a"), "replica") == "infer-0"
    (envoy,) = mesh.ads.status()
    status = next(s for s in envoy.types if s.type_url == CLUSTER)
    assert "bad" in status.nack
    assert "bad" not in status.names
    assert {"infer", "model/a"} <= set(status.names)
    mesh.source.extra = ()
    await mesh.show(mesh.instance(0, "a", "b"))
    (envoy,) = mesh.ads.status()
    assert [s.nack for s in envoy.types] == [""] * 4


async def test_a_call_to_coord_is_tried_when_no_replica_has_passed_its_health_check(mesh: Mesh):
    class Leader(coord_pb2_grpc.CoordServiceServicer):
        async def GetLeader(self, request, context):
            return coord_pb2.GetLeaderResponse(instance="local/coord-1")

    def instance(name: str) -> Instance:
        return Instance("coord", "local", name, f"unix:{mesh.folder}/{name}.sock", 1, State.READY, 1.0)

    rpc = Rpc(COORD, lambda server: coord_pb2_grpc.add_CoordServiceServicer_to_server(Leader(), server))
    # Without `serve()` its health is NOT_SERVING. Nothing listens for the other one.
    async with Server(f"unix:{mesh.folder}/coord-1.sock", [rpc], drain_ms=0):
        mesh.source.instances.set((instance("coord-8"), instance("coord-1")))

        async def are_unhealthy() -> bool:
            clusters = await mesh.envoy.admin_get("/clusters")
            return clusters.count(".sock::health_flags::/failed_active_hc") == 2

        await until(are_unhealthy, "both replicas are unhealthy")
        stub = coord_pb2_grpc.CoordServiceStub(mesh.channel)
        for _ in range(10):
            response = await stub.GetLeader(coord_pb2.GetLeaderRequest(), timeout=30)
            assert response.instance == "local/coord-1"


async def test_envoy_keeps_what_it_has_while_coord_is_gone_and_catches_up(mesh: Mesh, run_dir: Path):
    await mesh.replica(0)
    await mesh.replica(1)
    source = Changing()
    first, second = AdsServer(source), AdsServer(source)
    socket = f"unix:{run_dir}/other.sock"
    folder = run_dir / "b"
    folder.mkdir()
    async with AsyncExitStack() as stack:
        envoy = stack.enter_context(EnvoyProcess(folder, [run_dir / "other.sock"]))
        channel = await stack.enter_async_context(connect(envoy.gateway))
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        async with Server(socket, [], drain_ms=0, methods=first.methods()):
            source.instances.set((mesh.instance(0, "a"),))
            await envoy.until_ready()
            await until(lambda: len(first.status()) == 1 and len(first.status()[0].types) == 4)
            assert told(await stub.ModelInfer(request("a"), timeout=30), "replica") == "infer-0"
        await until(lambda: not first.status())
        assert told(await stub.ModelInfer(request("a"), timeout=30), "replica") == "infer-0"
        source.instances.set((mesh.instance(1, "a"),))
        async with Server(socket, [], drain_ms=0, methods=second.methods()):

            async def moved() -> bool:
                try:
                    return told(await stub.ModelInfer(request("a"), timeout=30), "replica") == "infer-1"
                except grpc.aio.AioRpcError as err:
                    if err.details() == "no healthy upstream":
                        return False  # The one that is new is asked for its health first.
                    raise

            await until(moved, "the new endpoint")
        # The same configuration from another process: nothing but endpoints was replaced.
        stats = await envoy.stats("cluster_manager.cluster_modified|listener_manager.listener_modified")
        assert set(stats.values()) == {0}


async def test_spans_of_a_call_reach_the_collector(run_dir: Path):
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

    spans: list = []

    async def export(message, context):
        for resource in message.resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
        return otlp.ExportTraceServiceResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        export, otlp.ExportTraceServiceRequest.FromString, otlp.ExportTraceServiceResponse.SerializeToString
    )
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    place = f"unix:{run_dir}/collector.sock"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(Server(place, [], drain_ms=0, methods={f"/{name}/Export": handler}))
        mesh = Mesh(run_dir, stack, Tracing(place))
        await mesh.start()
        await mesh.replica(0)
        await mesh.show(mesh.instance(0, "a"))
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        response = await mesh.infer("a", metadata=(("traceparent", f"00-{trace}-{parent}-01"),))
        assert told(response, "traceparent").split("-")[1] == trace

        def ours() -> list:
            return [span for service, span in spans if span.trace_id.hex() == trace]

        await until(lambda: len(ours()) >= 2, "two spans")
        assert {service for service, _ in spans} == {"shoal-envoy"}
        root = next(span for span in ours() if span.parent_span_id.hex() == parent)
        assert {span.parent_span_id for span in ours()} == {root.parent_span_id, root.span_id}
        # Health checks come twice a second: none of them is a span.
        assert not [span for _, span in spans if "health" in span.name.lower()]


async def test_spans_reach_a_collector_over_http(run_dir: Path):
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

    bodies: list[tuple[str, str, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().split("\r\n")
            headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
            body = b""
            while size := int(await reader.readline(), 16):  # Envoy sends chunks.
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
            bodies.append((lines[0], headers.get("authorization", ""), body))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    collector = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = collector.sockets[0].getsockname()[1]
    tracing = Tracing(f"http://127.0.0.1:{port}/v1/traces", "http/protobuf", (("authorization", "Bearer x"),))
    async with AsyncExitStack() as stack:
        mesh = Mesh(run_dir, stack, tracing)
        await mesh.start()
        await mesh.replica(0)
        await mesh.show(mesh.instance(0, "a"))
        await mesh.infer("a")
        await until(lambda: bodies, "an export")
        line, authorization, body = bodies[0]
        assert line.startswith("POST /v1/traces ")
        assert authorization == "Bearer x"
        assert otlp.ExportTraceServiceRequest.FromString(body).resource_spans
    collector.close()
