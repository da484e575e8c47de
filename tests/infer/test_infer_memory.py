"""The memory of requests of an infer process: bounded from the first frame to the end, fair, and zero afterwards."""

from __future__ import annotations

import asyncio
import gc
import gzip
import math
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mesh.h2 import frames
from mesh.h2.frames import Reason
from mesh.h2.memory_account import MemoryAccount
from mesh.rpc.access import Access
from mesh.rpc.framing import framed
from mesh.rpc.held_shares import HeldShares
from mesh.rpc.server import Server
from services.infer.core import InferenceServer
from services.infer.fast_path.bulk import Bulk
from services.infer.model_process.channel import Message
from services.infer.model_process.inner_calls import InnerCalls, ModelRun, OuterCall
from services.infer.model_stream_infer import stream_responses
from services.infer.models.control import Control
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.requests.request_memory import RequestPart
from services.infer.rpc import bulk_rpc, fast_methods, inference_rpc
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.scheduler import Scheduler
from services.infer.sources.repository import look, scan
from shoal.access import tokens
from shoal.access.caller_header import CALLER_HEADER, SERVICE
from shoal.access.limits import Kind
from shoal.errors import ERROR_CODE_PARAMETER, Code, InvalidArgument, ResourceExhausted, Unavailable
from shoal.inference.v2 import bulk_pb2
from shoal.inference.v2 import inference_pb2 as pb
from tests.access.policies import claims_of, key, passed, policy
from tests.breakable import PATIENCE_S, until
from tests.http2 import INFER, STREAM
from tests.infer import onnx_files
from tests.infer.conftest import Repository, request
from tests.mesh.h2.test_h2_isolation import Client, Front

MIB = 1 << 20
WIDE = {frames.WINDOW_SIZE: frames.LARGEST_WINDOW}
OCTET = ("content-type", "application/grpc; charset=utf-8")
BULK = "/shoal.inference.v2.BulkInference/InferBulk"
# A float has four bytes.
FLOATS_PER_MIB = MIB // 4


class Gate:
    """Keeps requests in the queues of models while closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_closed = False
        self._held: list[Scheduler] = []
        dispatch = Scheduler._dispatch

        def gated(scheduler: Scheduler, **options: Any) -> None:
            if self.is_closed:
                scheduler._will_dispatch = False
                self._held.append(scheduler)
            else:
                dispatch(scheduler, **options)

        monkeypatch.setattr(Scheduler, "_dispatch", gated)

    @property
    def has_requests(self) -> bool:
        return bool(self._held)

    def open(self) -> None:
        self.is_closed = False
        for scheduler in self._held:
            scheduler._dispatch_soon()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def wide(model: str, mib: float, **more: Any) -> bytes:
    """A request with `mib` of floats, which gzip makes some 20 times smaller."""
    values = np.random.default_rng(0).integers(0, 2, (1, int(mib * FLOATS_PER_MIB)))
    return request(model, x=values.astype(np.float32), **more).SerializeToString()


def repository(root: Path) -> None:
    models = Repository(root)
    for name in ("one", "two", "three"):
        models.bare(name, onnx_files.scale(2, ("n", "k")))
    models.bare("text", onnx_files.identity(TensorProto.STRING, ("n", "k")))
    eightfold = helper.make_node("Concat", ["x"] * 8, ["y"], axis=1)
    rows = ("n", "k")
    models.bare("grow", onnx_files.model([eightfold], [("x", 1, rows)], [("y", 1, rows)]))
    maps = ('input_map { key: "x" value: "%s" }', 'output_map { key: "y" value: "%s" }')
    steps = "".join(
        f'step {{ model_name: "{model}" model_version: -1 {maps[0] % source} {maps[1] % target} }}'
        for model, source, target in (("grow", "x", "wide"), ("sum", "wide", "y"))
    )
    total = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)
    models.bare("sum", onnx_files.model([total], [("x", 1, rows)], [("y", 1, (1, 1))]))
    folder = root / "chain"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        'platform: "ensemble" input { name: "x" data_type: TYPE_FP32 dims: [-1, -1] } '
        f'output {{ name: "y" data_type: TYPE_FP32 dims: [1, 1] }} ensemble_scheduling {{ {steps} }}'
    )


class Serving(Front):
    """A server with models, over TCP."""

    def __init__(self, server: Server, core: InferenceServer) -> None:
        super().__init__(server)
        self.core = core

    @property
    def held(self) -> int:
        return self.server.memory.bodies.held

    @asynccontextmanager
    async def peer(self, settings: dict[int, int] | None = None) -> AsyncIterator[Client]:
        """A connection with a wide window of its own; each stream's is as `settings` say."""
        async with super().peer(settings) as peer:
            peer.send(frames.window_update(0, frames.LARGEST_WINDOW - frames.DEFAULT_WINDOW))
            yield peer


@asynccontextmanager
async def serving(root: Path, limit: int, access: Access | None = None) -> AsyncIterator[Serving]:
    if not root.exists():
        repository(root)
    async with (
        Models(LoadContext.of(Runtimes([OnnxRuntime()]), QueueLimits())) as models,
        Control(models, partial(look, root)) as control,
    ):
        core = InferenceServer(models, "test/infer-0", control=control)
        control.offer(scan(root))
        await models.settled()
        rpcs = [inference_rpc(core, access), bulk_rpc(core, access)]
        fast = fast_methods(core, access)
        async with Server(
            "127.0.0.1:0", rpcs, drain_ms=500, fast_methods=fast, body_bytes=limit, access=access
        ) as server:
            await server.serve()
            made = Serving(server, core)
            yield made
            await made.until_nothing_is_held()


def errors_of(bodies: list[bytes]) -> list[int]:
    """The status codes in the responses of a stream; 0 for a response without an error."""
    responses = [pb.ModelStreamInferResponse.FromString(body) for body in bodies]
    return [response.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param for response in responses]


def messages(body: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(body):
        size = int.from_bytes(body[at + 1 : at + 5])
        found.append(body[at + 5 : at + 5 + size])
        at += 5 + size
    return found


async def send(peer: Client, path: str, message: bytes, *extra: tuple[str, str]) -> int:
    """Make a call as fast as the server gives credit."""
    number = peer.call(path, message, *extra)
    await peer.writer.drain()
    return number


@pytest.mark.parametrize("path_kind", ["fast", "slow"])
async def test_queued_requests_of_all_models_share_a_limit_and_other_tenants_find_room(
    tmp_path: Path, gate: Gate, path_kind: str
):
    extra = [("x-shoal-tenant", "hog")]
    async with serving(tmp_path / "m", 24 * MIB) as front, front.peer(WIDE) as hog, front.peer(WIDE) as other:
        names = ("one", "two", "three")
        if path_kind == "fast":
            # The next request of this form takes the fast path.
            for name in names:
                assert await hog.status(await send(hog, INFER, wide(name, 1))) == 0
        gate.is_closed = True
        numbers = [await send(hog, INFER, wide(names[n % 3], 1, id=str(n)), *extra) for n in range(24)]
        # Two thirds of the limit are 16 MiB. A request of the fast path takes 1 MiB, and 2 while its pieces are joined;
        # one of the slow path takes 3: its parsed copy and its tensors count, too.
        admitted = 14 if path_kind == "fast" else 5
        refused: set[int] = set()
        # Mostly the last ones: one that is read while others are joined may find less room than a later one.
        async with asyncio.timeout(PATIENCE_S):
            while len(refused) < len(numbers) - admitted:
                assert await hog.frame() is not None
                refused = getattr(hog, "ended", set()) & set(numbers)
        assert {(hog.ends[number]["grpc-status"], hog.ends[number]["retry-after-ms"]) for number in refused} == {
            (str(int(Code.RESOURCE_EXHAUSTED)), "1000")
        }
        held = front.held
        assert 14 * MIB < held <= 16 * MIB
        small = other.call(INFER, wide("one", 0.1))
        await until(lambda: front.held > held + MIB // 10, "the bystander's request is queued")
        gate.open()
        assert await other.status(small) == 0
        ends = [await hog.end_of(number) for number in numbers if number not in refused]
        assert {(end["grpc-status"], end.get("grpc-message")) for end in ends} == {("0", None)}


async def test_a_compressed_request_counts_with_its_decompressed_bytes_until_it_ends(tmp_path: Path, gate: Gate):
    async with serving(tmp_path / "m", 24 * MIB) as front, front.peer(WIDE) as peer:
        await peer.status(await send(peer, INFER, wide("one", 2)))
        gate.is_closed = True
        packed = gzip.compress(wide("one", 2), 1)
        assert len(packed) < 300_000
        numbers = [peer.open(INFER, ("grpc-encoding", "gzip")) for _ in range(12)]
        for number in numbers:
            peer.data(number, b"\1" + len(packed).to_bytes(4) + packed)
        for number in numbers[7:]:
            assert await peer.status(number) == Code.RESOURCE_EXHAUSTED
        assert front.held > 13 * MIB
        gate.open()
        assert {await peer.status(number) for number in numbers[:7]} == {0}


async def test_texts_count_with_their_objects(tmp_path: Path, gate: Gate):
    texts = request("text", x=np.array([[b"ab"] * 100_000], object)).SerializeToString()
    async with serving(tmp_path / "m", 24 * MIB) as front, front.peer(WIDE) as peer:
        gate.is_closed = True
        first = await send(peer, INFER, texts)
        # Not before it is queued: until then it takes more memory, and would be the one that is refused.
        await until(lambda: gate.has_requests, "the request is queued")
        held = front.held
        assert held > 100_000 * 56
        others = [await send(peer, INFER, texts) for _ in range(3)]
        assert await peer.status(others[-1]) == Code.RESOURCE_EXHAUSTED
        # Its outputs need the memory of the second one, which was admitted.
        for number in others:
            peer.send(frames.rst_stream(number, Reason.CANCEL))
        await until(lambda: front.held == held, "only the first request holds memory")
        gate.open()
        assert await peer.status(first) == 0


async def test_an_idle_stream_keeps_nothing_of_its_last_request_and_response(tmp_path: Path):
    # Nothing of them is counted any more.
    body, count = wide("one", 4), 6
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with (
        serving(tmp_path / "m", 256 * MIB) as front,
        grpc.aio.insecure_channel(front.server.address, options=unlimited) as channel,
    ):

        async def opened() -> grpc.aio.StreamStreamCall:
            call = channel.stream_stream(STREAM)()
            await call.write(body)
            assert len(await call.read()) > 4 * MIB
            return call

        calls = [await opened()]
        tracemalloc.start()
        try:
            calls += [await opened() for _ in range(count)]
            await until(lambda: front.held < MIB, "the requests have ended")
            gc.collect()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < 4 * MIB
        for call in calls:
            call.cancel()


async def test_tensors_between_the_steps_of_an_ensemble_count(tmp_path: Path):
    async with serving(tmp_path / "m", 6 * MIB) as front, front.peer(WIDE) as peer, front.peer(WIDE) as other:
        for _ in range(2):
            end = await peer.end_of(await send(peer, INFER, wide("chain", 0.6)))
            assert (end["grpc-status"], end["retry-after-ms"]) == (str(int(Code.RESOURCE_EXHAUSTED)), "1000")
            assert "in ensemble 'chain', step" in end["grpc-message"]
            assert await other.status(await send(other, INFER, wide("chain", 0.1))) == 0


async def test_a_response_that_is_much_larger_than_its_request_needs_room(tmp_path: Path):
    async with serving(tmp_path / "m", 6 * MIB) as front, front.peer(WIDE) as peer:
        assert await peer.status(await send(peer, INFER, wide("grow", 0.1))) == 0
        number = await send(peer, INFER, wide("grow", 0.5), OCTET)
        assert await peer.status(number) == Code.RESOURCE_EXHAUSTED


async def test_a_stream_whose_responses_are_not_read_is_bounded(tmp_path: Path):
    async with serving(tmp_path / "m", 12 * MIB) as front, front.peer({frames.WINDOW_SIZE: 1000}) as peer:
        number = peer.open(STREAM)
        for n in range(40):
            peer.data(number, framed(wide("grow", 0.03, id=str(n))), is_end=n == 39)
        await until(lambda: front.held > 7 * MIB, "responses wait")
        async with front.peer(WIDE) as other:
            assert await other.status(await send(other, INFER, wide("one", 0.1))) == 0
        assert front.held <= 8 * MIB
        peer.send(frames.window_update(number, 1 << 30))
        status = await peer.status(number)
        codes = errors_of(messages(peer.body(number)))
        # Requests that arrive while the responses fill the limit end the stream.
        assert (status, len(codes)) == (0, 40) or status == Code.RESOURCE_EXHAUSTED
        # The requests run concurrently: those that end first find room for their responses.
        assert {0} <= set(codes) <= {0, Code.RESOURCE_EXHAUSTED}
        assert Code.RESOURCE_EXHAUSTED in {status, *codes}


class Limited:
    """Memory of a call with a limit."""

    def __init__(self, limit: int, message_bytes: int = 0) -> None:
        self._share = MemoryAccount(limit).share()
        self.message_bytes = message_bytes

    @property
    def held(self) -> int:
        return self._share.held

    def hold(self, size: int) -> None:
        if not self._share.has_room(size):
            raise ResourceExhausted("no room", retry_after_ms=1000)
        self._share.add(size)

    hold_response = hold

    def release(self, size: int) -> None:
        self._share.remove(size)
        assert self.held >= 0


async def test_outcomes_of_a_bulk_that_are_not_read_are_bounded():
    memory = Limited(24 * MIB, message_bytes=1000)
    answer = bytes(5 * MIB)

    def infer(body: bytes, entry: Any) -> None:
        entry.hold(100)
        entry.reply((answer,), len(answer))

    async def requests() -> AsyncIterator[Any]:
        yield bulk_pb2.InferBulkRequest(entries=[{"number": n, "request": b"x"} for n in range(6)])

    outcomes = []
    async for message in Bulk(infer, "i", memory=memory).responses(requests()):  # type: ignore[arg-type]
        outcomes += [(outcome.code, outcome.retry_after_ms, len(outcome.response)) for outcome in message.answers]
    full = (int(Code.RESOURCE_EXHAUSTED), 1000, 0)
    assert outcomes == [(0, 0, 5 * MIB)] * 3 + [full] * 3
    assert memory.held == 2000


async def test_an_error_of_a_decoupled_request_reaches_the_client_when_the_memory_is_full():
    memory = Limited(1 * MIB)

    def refuse(size: int) -> None:
        raise ResourceExhausted("no room", retry_after_ms=1000)

    async def responses() -> AsyncIterator[Any]:
        memory._share.add(2 * MIB)
        # As after the end of the call.
        memory.hold = refuse
        yield InvalidArgument("the model's own error")
        raise Unavailable("the model has failed")

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield pb.ModelInferRequest(model_name="m", id="7")

    async def infer(*_: Any) -> pb.ModelInferResponse:
        raise AssertionError("the model is decoupled")

    stream = stream_responses(requests(), infer, lambda *_: responses(), memory)
    read = [pb.ModelStreamInferResponse.FromString(b"".join(response.parts)) async for response in stream]
    errors = [(response.error_message, response.infer_response.id) for response in read]
    assert errors == [("the model's own error", "7"), ("the model has failed", "7")]


async def test_raw_contents_of_a_streams_responses_are_not_copied():
    memory, contents = Limited(256 * MIB), np.arange(1 << 18, dtype=np.float32)

    async def responses(raw: list[Any]) -> AsyncIterator[Any]:
        for n in range(2):
            raw.append(contents)
            yield pb.ModelInferResponse(id=str(n))

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield pb.ModelInferRequest(model_name="m")

    async def infer(*_: Any) -> pb.ModelInferResponse:
        raise AssertionError("the model is decoupled")

    stream = stream_responses(requests(), infer, lambda message, part, raw: responses(raw), memory)
    messages = [message async for message in stream]
    assert len(messages) == 2
    for n, message in enumerate(messages):
        assert sum(part is contents for part in message.parts) == 1
        whole = b"".join(message.parts)
        response = pb.ModelStreamInferResponse.FromString(whole).infer_response
        assert (len(whole), response.id, response.raw_output_contents[:]) == (
            message.size,
            str(n),
            [contents.tobytes()],
        )


@pytest.mark.parametrize(("kib", "most"), [(1_024, 1), (200, 3), (1, 32)])
async def test_a_decoupled_request_pauses_while_its_responses_wait_for_the_client(kib: int, most: int):
    memory = Limited(256 * MIB)
    made = 0

    async def responses() -> AsyncIterator[Any]:
        nonlocal made
        for _ in range(100):
            made += 1
            yield pb.ModelInferResponse(raw_output_contents=[bytes(kib << 10)])

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield pb.ModelInferRequest(model_name="m", id="7")

    async def infer(*_: Any) -> pb.ModelInferResponse:
        raise AssertionError("the model is decoupled")

    stream = stream_responses(requests(), infer, lambda *_: responses(), memory)
    await anext(stream)
    for _ in range(100):
        await asyncio.sleep(0)
    # The first one is read.
    assert made <= 1 + most
    assert len([response async for response in stream]) == 99
    assert memory.held == 0


class CallingModel:
    """Model of a caller, as far as InnerCalls reads it."""

    name = "caller"
    instances = (0,)


async def test_inner_calls_are_bounded_and_return_their_memory(tmp_path: Path, gate: Gate):
    # Five calls of 3 MiB are two thirds of the limit. Six with their responses take 24 MiB and some KiB.
    async with serving(tmp_path / "m", 25 * MIB) as front, front.peer(WIDE) as peer:
        calls = InnerCalls()
        calls.bind(front.core, front.server.memory.bodies)
        replies: list[dict[str, Any]] = []
        header = {"model": "one", "version": "", "request_id": "", "parameters": {}, "outputs": []}
        tensor = ("x", "FP32", np.ones((1, FLOATS_PER_MIB), np.float32))
        model: Any = CallingModel()
        hog, other = (ModelRun(model, lambda tenant=tenant: OuterCall(tenant=tenant)) for tenant in ("hog", "other"))
        gate.is_closed = True
        for _ in range(12):
            calls(Message(header, [tensor]), hog, lambda header, parts: replies.append(header))
        await until(lambda: len(replies) == 7, "calls without room end")
        assert {reply["code"] for reply in replies} == {"RESOURCE_EXHAUSTED"}
        held = front.held
        calls(Message(header, [tensor]), other, lambda header, parts: replies.append(header))
        await until(lambda: front.held >= held + 3 * MIB, "the other tenant's call waits for the model")
        bystander = await send(peer, INFER, wide("two", 0.1))
        gate.open()
        assert await peer.status(bystander) == 0
        await until(lambda: len(replies) == 13, "the others are answered")
        assert [reply.get("code") for reply in replies[7:]] == [None] * 6


def test_the_memory_of_one_request_of_a_call_is_released_once():
    memory = Limited(1000)
    part = RequestPart(memory)
    part.hold(100)
    part.hold(50)
    part.release(30)
    part.close()
    part.close()
    part.hold(10)
    part.release(10)
    assert memory.held == 0


CALLS = st.tuples(
    st.sampled_from(["one", "two", "text", "chain", "grow", "nobody", "garbage"]),
    st.sampled_from([INFER, INFER, STREAM, BULK]),
    st.sampled_from(["identity", "identity", "gzip"]),
    st.sampled_from(["application/grpc", "application/grpc+proto"]),
    # Kilobytes of input.
    st.sampled_from([1, 30, 300]),
    st.sampled_from(["", "1m", "20S"]),
    st.sampled_from(["read", "read", "half", "reset", "reset half", "wait", "two messages"]),
)


def message_of(model: str, path: str, kilobytes: int, caller: bytes) -> bytes:
    if model == "garbage":
        return b"\xff" * kilobytes * 1024
    if model == "text":
        made = request("text", x=np.array([[b"ab"] * (kilobytes * 10)], object))
    else:
        made = request(model, x=np.ones((1, kilobytes * 256), np.float32))
    if path == BULK:
        entry = {"request": made.SerializeToString(), "timeout_ms": 20_000, "caller": caller}
        entries = [{"number": n, **entry} for n in range(2)]
        return bulk_pb2.InferBulkRequest(entries=entries).SerializeToString()
    return made.SerializeToString()


async def end_in_many_ways(front: Serving, calls: list[Any], caller: bytes, *, is_lost: bool, window: int) -> None:
    """Make calls on one connection, which reads `window` bytes of each response; lose it at the end, or not.

    Bulks are a service's, for jobs of `caller`.
    """
    async with front.peer({frames.WINDOW_SIZE: window}) as peer:
        read: list[int] = []
        for model, path, encoding, content, kilobytes, timeout, end in calls:
            extra = [("grpc-encoding", encoding), ("x-shoal-tenant", model)]
            extra += [("grpc-timeout", timeout)] if timeout else []
            extra.append((CALLER_HEADER, (SERVICE if path == BULK else caller).decode()))
            number, peer.next_number = peer.next_number, peer.next_number + 2
            head = [(":method", "POST"), (":path", path), ("content-type", content), *extra]
            peer.send(peer.headers(number, head))
            message = message_of(model, path, kilobytes, caller)
            body = framed(message)
            if encoding == "gzip":
                packed = gzip.compress(message, 1)
                body = b"\1" + len(packed).to_bytes(4) + packed
            is_half = "half" in end
            peer.data(number, body[: len(body) // 2] if is_half else body, is_end=not is_half and end != "two messages")
            if end == "two messages":
                peer.data(number, body)
            if "reset" in end:
                peer.send(frames.rst_stream(number, Reason.CANCEL))
            if end == "wait":
                peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
                await peer.until(frames.PING)
            if end == "read" and window > MIB:
                read.append(number)
        if not is_lost:
            for number in read:
                await peer.end_of(number)


async def test_every_way_to_end_returns_the_memory_and_what_was_in_flight(tmp_path: Path):
    loop = asyncio.get_running_loop()
    signer = tokens.create_signer(tmp_path / "signer.json")
    caller = passed(claims_of(key(signer)))[1].encode()
    # Some calls are refused.
    limit = {"name": "all", "requests_in_flight": 8, "rows_per_second": 1_000_000}
    shares = HeldShares(tuple(Kind), (Kind.IN_FLIGHT, Kind.ROWS), part=1.0)
    access = Access(policy(signer, limits=[limit]), shares=shares)
    async with serving(tmp_path / "m", 4 * MIB, access) as front:

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(st.lists(CALLS, max_size=12), st.booleans(), st.sampled_from([0, 1000, frames.LARGEST_WINDOW]))
        def play(calls: list[Any], is_lost: bool, window: int) -> None:
            async def once() -> None:
                await end_in_many_ways(front, calls, caller, is_lost=is_lost, window=window)
                await front.until_nothing_is_held()
                memory = front.server.memory
                assert (memory.bodies.held, memory.unread.held) == (0, 0)
                # Its connection may have been lost a moment ago.
                await until(lambda: shares.in_flight == 0, "the end of what is in flight")

            asyncio.run_coroutine_threadsafe(once(), loop).result(60)

        await asyncio.to_thread(play)
    assert math.isfinite(front.held)
