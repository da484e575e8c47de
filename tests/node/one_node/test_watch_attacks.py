"""Watches and exports under attack on a node: bystanders go on, places come free, memory comes back.

The attackers are of one tenant; bystanders are of it and of another one. All go through the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.siege.servers import resident_mib
from shoal.coord.v1 import coord_pb2
from shoal.inference.v2 import inference_pb2
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.breakable import until
from tests.long_form import by_form

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

PATIENCE_S = 120.0
MIB = 1 << 20
ATTACKER, NEIGHBOUR = "attacker", "neighbour"
STORE, INGEST, COORD = (
    "/shoal.store.v1.StoreService/",
    "/shoal.ingest.v1.IngestService/",
    "/shoal.coord.v1.CoordService/",
)
WATCH_JOBS, WATCH_RESULTS, WATCH_MODELS = INGEST + "WatchJobs", STORE + "WatchResults", STORE + "WatchModels"
STREAM_RESULTS, EXPORT = STORE + "StreamResults", STORE + "ExportResults"
WATCH_INSTANCES = COORD + "WatchInstances"
OF = {WATCH_JOBS: "ingest-0", WATCH_INSTANCES: "coord-0"}
"""The process that serves a method; the others are store's."""
REQUESTS: dict[str, Any] = {
    WATCH_JOBS: ingest_pb2.WatchJobsRequest(),
    WATCH_RESULTS: store_pb2.WatchResultsRequest(),
    WATCH_MODELS: store_pb2.WatchModelsRequest(),
    WATCH_INSTANCES: coord_pb2.WatchInstancesRequest(),
    STREAM_RESULTS: store_pb2.StreamResultsRequest(),
    EXPORT: store_pb2.ExportResultsRequest(),
}
MOST = {WATCH_JOBS: 66, WATCH_RESULTS: 133, WATCH_MODELS: 133, WATCH_INSTANCES: 66, STREAM_RESULTS: 42, EXPORT: 2}
"""Places that one tenant gets: docs/limits.md."""
LARGE, LARGE_BYTES = 24, 6 * MIB
CEILING_MIB = 1024
CHANNELS = 8
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.lookahead_bytes", 65_536),
    ("grpc.http2.bdp_probe", 0),
]
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class Clients:
    """Connections of one tenant to an address."""

    def __init__(self, address: str, tenant: str, count: int = 1) -> None:
        self._channels = [grpc.aio.insecure_channel(address, OPTIONS) for _ in range(count)]
        self._metadata = (("x-shoal-tenant", tenant),)
        self._opened = 0

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    def open(self, method: str, request: Any = None) -> Any:
        """Open a stream, whose messages stay bytes."""
        self._opened += 1
        channel = self._channels[self._opened % len(self._channels)]
        message = REQUESTS[method] if request is None else request
        return channel.unary_stream(method)(
            message.SerializeToString(), metadata=self._metadata, timeout=PATIENCE_S * 3
        )

    async def call(self, method: str, request: Any) -> bytes:
        call = self._channels[0].unary_unary(method)
        return await call(request.SerializeToString(), metadata=self._metadata, timeout=PATIENCE_S)


async def outcome(stream: Any) -> str:
    """The first message of a stream, in a word: "open" or its status."""
    try:
        return "ended" if await stream.read() is grpc.aio.EOF else "open"
    except grpc.aio.AioRpcError as err:
        return err.code().name


class Bystanders:
    """Calls of both tenants, one after the other, with a pause between two rounds; each must succeed."""

    def __init__(self, node: Any, pause_s: float = 0.2) -> None:
        self._node = node
        self._pause_s = pause_s
        self.calls: Counter[str] = Counter()

    async def __aenter__(self) -> Bystanders:
        self._is_over = False
        self._tasks = [asyncio.create_task(self._run(tenant)) for tenant in (ATTACKER, NEIGHBOUR)]
        return self

    async def _run(self, tenant: str) -> None:
        async with Clients(self._node.gateway, tenant) as clients:
            while not self._is_over:
                await clients.call(STORE + "ListModels", store_pb2.ListModelsRequest())
                query = store_pb2.QueryResultsRequest(page_size=1, omit_response=True)
                await clients.call(STORE + "QueryResults", query)
                await clients.call(INGEST + "ListJobs", ingest_pb2.ListJobsRequest(page_size=1))
                await clients.call(COORD + "ListInstances", coord_pb2.ListInstancesRequest())
                if tenant == NEIGHBOUR:
                    for method in (WATCH_JOBS, WATCH_RESULTS, WATCH_MODELS, WATCH_INSTANCES, STREAM_RESULTS):
                        stream = clients.open(method)
                        assert await outcome(stream) == "open", method
                        stream.cancel()
                self.calls[tenant] += 1
                await asyncio.sleep(self._pause_s)

    async def __aexit__(self, *_: object) -> None:
        # Both have had a whole round during the attack.
        await until(lambda: len(self.calls) == 2 or any(task.done() for task in self._tasks), "rounds", PATIENCE_S)
        self._is_over = True
        await asyncio.gather(*self._tasks)


class Memory:
    """The resident memory of the services during an attack."""

    def __init__(self, node: Any) -> None:
        self._pids = {name: node.pids()[name] for name in ("ingest-0", "store-0", "coord-0", "envoy")}
        self.before = {name: resident_mib(pid) for name, pid in self._pids.items()}
        self.peak = dict(self.before)

    async def __aenter__(self) -> Memory:
        self._task = asyncio.create_task(self._follow())
        return self

    async def _follow(self) -> None:
        while True:
            for name, pid in self._pids.items():
                self.peak[name] = max(self.peak[name], resident_mib(pid))
            await asyncio.sleep(0.05)

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        grown = {name: round(self.peak[name] - self.before[name]) for name in self.peak}
        print("grown by MiB:", grown)
        assert max(grown.values()) < CEILING_MIB, grown
        await until(
            lambda: all(resident_mib(pid) < self.before[name] + 256 for name, pid in self._pids.items()),
            "memory is back",
            PATIENCE_S,
        )


def listen_of(pid: int, service: str) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    prefix = f"SHOAL_{service.upper()}_LISTEN=".encode()
    return next(each.removeprefix(prefix).decode() for each in variables if each.startswith(prefix))


@pytest.fixture(scope="module")
def results(running: Any) -> None:
    """Large results of the attacker's tenant, and small ones of both."""

    def result(number: int, size: int, tenant: str) -> store_pb2.Result:
        response = inference_pb2.ModelInferResponse(model_name="double", model_version="1")
        response.outputs.add(name="y", datatype="UINT8", shape=[size])
        response.raw_output_contents.append(random.Random(number).randbytes(size))
        return store_pb2.Result(
            job_id=f"{tenant}-{size}-{number}",
            outcome=store_pb2.Result.OUTCOME_SUCCEEDED,
            response=response,
            tenant=tenant,
            model_name="double",
            labels={"kind": "one", "number": str(number)},
        )

    async def put() -> None:
        socket = listen_of(running.pids()["store-0"], "store")
        async with grpc.aio.insecure_channel(socket, OPTIONS) as channel:
            stub: Any = store_pb2_grpc.StoreServiceStub(channel)
            for number in range(LARGE):
                await stub.PutResults(store_pb2.PutResultsRequest(results=[result(number, LARGE_BYTES, ATTACKER)]))
            for tenant in (ATTACKER, NEIGHBOUR):
                for first in range(0, by_form(2_000, 20_000), 500):
                    some = [result(number, 16, tenant) for number in range(first, first + 500)]
                    await stub.PutResults(store_pb2.PutResultsRequest(results=some))

    asyncio.run(put())


async def filled(clients: Clients, method: str) -> Sequence[Any]:
    """Take all places that the tenant gets: a few less while another tenant has some."""
    found: list[Any] = []
    outcomes: list[str] = []
    while EXHAUSTED.name not in outcomes:
        streams = [clients.open(method) for _ in range(20)]
        outcomes = await asyncio.gather(*map(outcome, streams))
        # On a busy machine, MongoDB may be too slow for so many at the same time.
        assert set(outcomes) <= {"open", EXHAUSTED.name, "UNAVAILABLE"}
        found += [stream for stream, became in zip(streams, outcomes, strict=True) if became == "open"]
    assert MOST[method] - 6 <= len(found) <= MOST[method]
    return found


@pytest.mark.parametrize("method", REQUESTS)
async def test_streams_that_are_opened_and_not_read(running: Any, results: None, method: str) -> None:
    async with Memory(running), Bystanders(running), Clients(running.gateway, ATTACKER, CHANNELS) as clients:
        streams = [clients.open(method) for _ in range(3 * MOST[method])]
        refused = 0

        def note(stream: Any) -> None:
            nonlocal refused
            refused += 1

        for stream in streams:
            stream.add_done_callback(note)
        await until(lambda: refused >= 2 * MOST[method], "those beyond the places are refused", PATIENCE_S)
        ended = [stream for stream in streams if stream.done()]
        assert Counter([await stream.code() for stream in ended])[EXHAUSTED] >= 2 * MOST[method]
        for stream in streams:
            stream.cancel()
        await until_free(clients, method)


async def until_free(clients: Clients, method: str, every_s: float = 0.5) -> None:
    """Return once as many streams can be opened again as before."""

    async def is_free() -> bool:
        streams = [clients.open(method) for _ in range(MOST[method])]
        outcomes = Counter(await asyncio.gather(*map(outcome, streams)))
        for stream in streams:
            stream.cancel()
        await asyncio.sleep(0.2)
        return outcomes == {"open": len(streams)}

    await until(is_free, f"all places of {method} are free", PATIENCE_S, every_s)


@pytest.mark.parametrize("method", REQUESTS)
async def test_streams_that_are_cancelled_at_any_moment(running: Any, results: None, method: str) -> None:
    draw, rounds = random.Random(method), by_form(300, 1_000)
    statuses: Counter[str] = Counter()

    async def cancelled(clients: Clients) -> None:
        stream = clients.open(method)
        try:
            for _ in range(draw.randrange(3)):
                async with asyncio.timeout(draw.random() * 0.1):
                    await stream.read()
            await asyncio.sleep(draw.random() * 0.02)
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as err:
            statuses[err.code().name] += 1
        stream.cancel()

    async with Memory(running), Bystanders(running), Clients(running.gateway, ATTACKER, CHANNELS) as clients:
        slots = asyncio.Semaphore(40)

        async def one() -> None:
            async with slots:
                await cancelled(clients)

        await asyncio.gather(*(one() for _ in range(rounds)))
        assert statuses.keys() <= {EXHAUSTED.name}, statuses
        await until_free(clients, method)


class Relay:
    """Forwards connections to an address, until it stops without closing any: as a machine that has lost its power."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, back]
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._forward(source, sink))
            self._tasks.add(task)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()


async def test_streams_of_clients_that_vanish(running: Any, results: None) -> None:
    methods = [method for method in REQUESTS if method != EXPORT]
    # The node needs a minute until it gives the clients up. Without pauses, the rounds would keep both cores busy.
    async with (
        Memory(running),
        Bystanders(running, pause_s=0.5),
        Relay(running.gateway) as relay,
        Clients(relay.address, ATTACKER, CHANNELS) as vanishing,
        Clients(running.gateway, ATTACKER, CHANNELS) as clients,
    ):
        # Kept: a stream that nobody refers to is cancelled.
        streams = [await filled(vanishing, method) for method in methods]
        relay.stop()
        for method in methods:
            await until_free(clients, method, every_s=2.0)
        for stream in itertools.chain(*streams):
            stream.cancel()


async def test_filters_that_match_nothing(running: Any, results: None) -> None:
    # One index has the first label; the second is read in each document.
    labels = {"kind": "one", "none": "such"}
    async with Memory(running), Bystanders(running), Clients(running.gateway, ATTACKER, CHANNELS) as clients:
        query = store_pb2.QueryResultsRequest(labels=labels)
        queries = [clients.call(STORE + "QueryResults", query) for _ in range(by_form(200, 1_000))]
        bodies = await asyncio.gather(*queries)
        assert not any(store_pb2.QueryResultsResponse.FromString(body).results for body in bodies)
        export = store_pb2.ExportResultsRequest(filter=store_pb2.ResultFilter(labels=labels))
        messages = [store_pb2.ExportResultsResponse.FromString(each) async for each in clients.open(EXPORT, export)]
        assert messages[-1].complete
        assert messages[-1].rows == 0


async def test_exports_of_another_tenant(running: Any, results: None) -> None:
    async with Clients(running.gateway, ATTACKER) as clients:
        of_another = store_pb2.ResultFilter(tenant=NEIGHBOUR)
        for method, request in (
            (EXPORT, store_pb2.ExportResultsRequest(filter=of_another)),
            (STREAM_RESULTS, store_pb2.StreamResultsRequest(filter=of_another)),
            (WATCH_RESULTS, store_pb2.WatchResultsRequest(tenant=NEIGHBOUR)),
            (WATCH_JOBS, ingest_pb2.WatchJobsRequest(tenant=NEIGHBOUR)),
        ):
            assert await outcome(clients.open(method, request)) == "PERMISSION_DENIED", method
