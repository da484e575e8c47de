"""The ceiling of Envoy's heap with a real Envoy: clients that hold memory lose their streams, and others are served."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from mesh.h2 import frames
from mesh.h2.headers import LIST_BYTES
from mesh.rpc.framing import framed
from tests.breakable import until
from tests.http2 import INFER, STREAM
from tests.mesh.h2.test_h2_isolation import Client as FrontClient
from tests.mesh.h2.test_h2_isolation import credit
from tests.mesh.xds.test_xds_envoy import Mesh, request, told

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

MIB = 1 << 20
HEAP = 64 * MIB
RESETS = "envoy.overload_actions.reset_high_memory_stream.count"
SHED = "overload.envoy.load_shed_points.http2_server_go_away_and_close_on_dispatch.shed_load_count"
IDLE_ENDS = "http.gateway.downstream_rq_idle_timeout"
PRESSURE = "overload.envoy.resource_monitors.fixed_heap.pressure"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    """A mesh whose Envoy has a small heap, and waits for whole messages: no instance has both models."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = Mesh(folder, stack, None, heap=HEAP)
        await made.start()
        await made.envoy.until_ready()
        await made.replica(0)
        await made.replica(1)
        await made.show(made.instance(0, "a"), made.instance(1, "b"))
        yield made
    shutil.rmtree(folder, ignore_errors=True)


class Client(FrontClient):
    """One connection to the gateway."""

    def open(self, path: str, *extra: tuple[str, str]) -> int:
        number, self.next_number = self.next_number, self.next_number + 2
        head = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        self.send(self.headers(number, [*head, ("content-type", "application/grpc"), ("te", "trailers"), *extra]))
        return number


@asynccontextmanager
async def client(mesh: Mesh, window: int = frames.LARGEST_WINDOW) -> AsyncIterator[Client]:
    host, _, port = mesh.envoy.gateway.rpartition(":")
    made = Client(*await asyncio.open_connection(host, int(port)))
    made.send(frames.PREFACE, frames.settings({frames.WINDOW_SIZE: window, frames.HEADER_LIST_SIZE: LIST_BYTES}))
    await made.until(frames.SETTINGS)
    made.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
    try:
        yield made
    finally:
        made.writer.close()


# Attacks. Beyond 95 %, Envoy may close their connection.

# Begin of a tensor of 100 MiB.
LARGE = b"\x3a\x80\x80\x80\x32"


async def half_of_large_messages(mesh: Mesh, stack: AsyncExitStack) -> None:
    """Hold bodies of 10 MiB that are not whole."""
    peer = await stack.enter_async_context(client(mesh))
    for _ in range(8):
        number = peer.open(INFER)
        peer.data(number, framed(LARGE + bytes(100 * MIB))[:MIB], is_end=False)
        for sent in range(MIB, 10 * MIB, MIB // 2):
            # The stream's window is 1 MiB.
            while credit(peer, number) < sent - MIB // 2 and not is_ended(peer, number):
                if await peer.frame() is None:
                    return
            if not is_ended(peer, number):
                peer.data(number, bytes(MIB // 2), is_end=False)


async def half_of_many_messages(mesh: Mesh, stack: AsyncExitStack) -> None:
    """Hold many bodies of 60 KiB that are not whole."""
    body = framed(LARGE + bytes(100_000))[: 60 << 10]
    for _ in range(2):
        peer = await stack.enter_async_context(client(mesh))
        sent = 0
        for _ in range(900):
            peer.data(peer.open(INFER), body, is_end=False)
            sent += len(body)
            # The connection's window is 16 MiB.
            while credit(peer, 0) < sent - 8 * MIB:
                if await peer.frame() is None:
                    return


async def unread_responses(mesh: Mesh, stack: AsyncExitStack) -> None:
    """Read nothing of large responses."""
    body = framed(request("a", 900_000, echo=1).SerializeToString())
    peer = await stack.enter_async_context(client(mesh, window=0))
    sent = 0
    for _ in range(150):
        peer.data(peer.open(INFER), body)
        sent += len(body)
        while credit(peer, 0) < sent - 8 * MIB:
            if await peer.frame() is None:
                return


def is_ended(peer: Client, number: int) -> bool:
    return any(kind == frames.RST_STREAM and of == number for kind, _, of, _ in peer.seen)


@pytest.mark.parametrize("attack", [half_of_large_messages, half_of_many_messages, unread_responses])
async def test_streams_that_hold_much_of_the_heap_are_reset_and_others_are_served(
    mesh: Mesh, attack: Callable[[Mesh, AsyncExitStack], Awaitable[None]]
):
    idle_mib = rss_mib(mesh)
    before = (await mesh.envoy.stats(RESETS))[RESETS]
    peak_mib = served = refused = 0
    is_over = asyncio.Event()

    async def bystander() -> None:
        nonlocal peak_mib, served, refused
        while not is_over.is_set():
            try:
                assert told(await mesh.infer("b"), "header") == "b"
                served += 1
            except grpc.aio.AioRpcError as err:
                # Above 95 % of the ceiling, until streams end.
                if err.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                refused += 1
            peak_mib = max(peak_mib, rss_mib(mesh))
            await asyncio.sleep(0.005)

    async def has_reset() -> bool:
        return (await mesh.envoy.stats(RESETS))[RESETS] > before

    calling = asyncio.create_task(bystander())
    async with AsyncExitStack() as stack:
        await attack(mesh, stack)
        await until(has_reset, "Envoy resets streams")
        seen = served
        await until(lambda: served >= seen + 10 or calling.done(), "the bystander is served")
    is_over.set()
    await calling
    print(attack.__name__, idle_mib, peak_mib, served, refused, (await mesh.envoy.stats(RESETS))[RESETS] - before)
    assert peak_mib - idle_mib < 1.3 * (HEAP >> 20)

    async def has_room() -> bool:
        # Below this, no stream is reset.
        return (await mesh.envoy.stats(PRESSURE))[PRESSURE] < 75

    await until(has_room, "the heap is free again")
    assert told(await mesh.infer("a"), "header") == "a"


async def test_streams_that_do_nothing_do_not_keep_the_heap_full(mesh: Mesh):
    """None holds enough to be reset. Envoy refused every other call for as long as they were open."""
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "a"))
    message = framed(request("a").SerializeToString())

    async def is_served() -> bool:
        try:
            return told(await mesh.infer("a"), "attempt") == "1"
        except grpc.aio.AioRpcError as err:
            if err.details() != "envoy overloaded":
                raise
            return False

    async def have_ended() -> bool:
        return (await mesh.envoy.stats(IDLE_ENDS))[IDLE_ENDS] > 0

    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(client(mesh)) for _ in range(4)]
        # What is sent while the heap is full may end the connection.
        while (pressure := (await mesh.envoy.stats(PRESSURE))[PRESSURE]) < 95:
            for peer in peers:
                for _ in range(30 if pressure < 85 else 3):
                    peer.data(peer.open(STREAM), message, is_end=False)
                await peer.writer.drain()
            # Envoy looks at its heap after 50 ms.
            await asyncio.sleep(0.1)
        await until(have_ended, "idle streams end")
        await until(is_served, "others are served")
    await mesh.show(mesh.instance(0, "a"), mesh.instance(1, "b"))


async def test_streams_that_send_a_byte_now_and_then_do_not_keep_the_heap_full(mesh: Mesh):
    """Each makes progress. Envoy refused every other call for as long as they were open."""
    numbers = range(1, 2_000, 2)

    async def dripping(peer: Client) -> None:
        # Until Envoy closes the connection.
        with suppress(ConnectionError):
            while True:
                for number in numbers:
                    peer.data(number, b"x", is_end=False)
                await peer.writer.drain()
                await asyncio.sleep(0.3)

    async def are_closed() -> bool:
        return (await mesh.envoy.stats(SHED))[SHED] > 0

    async def is_served() -> bool:
        try:
            return told(await mesh.infer("b"), "header") == "b"
        except grpc.aio.AioRpcError as err:
            # Its connection may be closed, too.
            if err.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False

    async with AsyncExitStack() as stack:
        drips = []
        for _ in range(4):
            peer = await stack.enter_async_context(client(mesh))
            for _ in numbers:
                peer.data(peer.open(INFER), framed(LARGE + bytes(100_000))[:20], is_end=False)
            drips.append(asyncio.create_task(dripping(peer)))
        await until(are_closed, "Envoy closes connections")
        await until(is_served, "others are served")
        for drip in drips:
            drip.cancel()
        await asyncio.wait(drips)


def rss_mib(mesh: Mesh) -> int:
    lines = Path(f"/proc/{mesh.envoy.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))
