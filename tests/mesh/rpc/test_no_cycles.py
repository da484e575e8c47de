"""A call that has ended is freed at once, however it ended: its body does not wait for a garbage collection."""

from __future__ import annotations

import asyncio
import gc
import gzip
import threading
from collections.abc import Iterator

import grpc
import pytest

from mesh.h2 import frames
from mesh.h2.frames import Reason
from mesh.rpc.fast_call import FastCall
from mesh.rpc.framing import framed
from mesh.rpc.server import Server
from mesh.rpc.slow_call import SlowCall
from tests.mesh.h2.test_h2_isolation import WIDE, Client, Front

FAST, SLOW, STREAM = "/t.T/Fast", "/t.T/Slow", "/t.T/Stream"
GZIP = ("grpc-encoding", "gzip")
BOMB = gzip.compress(bytes(40 << 20))
PATIENCE_S = 30.0


class Work:
    """Work on a call, as a model's scheduler has it."""

    def __init__(self, call) -> None:
        self.call = call

    def abandon(self) -> None:
        pass


def fast(body, call):
    call.on_end = Work(call).abandon
    call.reply((body[5:],), len(body) - 5)


async def slow(request, context):
    return request


async def stream(requests, context):
    async for request in requests:
        yield request


@pytest.fixture
async def front():
    methods = {path: grpc.unary_unary_rpc_method_handler(slow, bytes, bytes) for path in (FAST, SLOW)}
    methods[STREAM] = grpc.stream_stream_rpc_method_handler(stream, bytes, bytes)
    async with Server("127.0.0.1:0", [], drain_ms=500, fast_methods={FAST: fast}, methods=methods) as server:
        await server.serve()
        yield Front(server)


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def until_all_are_freed() -> None:
    """Wait until no call is left, without the garbage collector."""
    async with asyncio.timeout(PATIENCE_S):
        while any(isinstance(each, FastCall | SlowCall) for each in gc.get_objects()):
            await asyncio.sleep(0.01)


async def answered(peer: Client, path: str) -> None:
    await peer.end_of(peer.call(path, b"x"))


async def reset(peer: Client, path: str) -> None:
    number = peer.open(path)
    peer.data(number, framed(bytes(100_000))[:50_000], is_end=False)
    peer.send(frames.rst_stream(number, Reason.CANCEL))
    await answered(peer, SLOW)


async def left_unfinished(peer: Client, path: str) -> None:
    number = peer.open(path)
    peer.data(number, framed(bytes(100_000))[:50_000], is_end=False)
    await answered(peer, SLOW)


async def bomb(peer: Client, path: str) -> None:
    number = peer.open(path, GZIP)
    body = framed(BOMB)
    peer.data(number, bytes([1]) + body[1:])
    await peer.end_of(number)


async def malformed(peer: Client, path: str) -> None:
    number = peer.open(path)
    peer.data(number, b"\x07" + bytes(10))
    await peer.end_of(number)


async def expired(peer: Client, path: str) -> None:
    number = peer.open(path, ("grpc-timeout", "50m"))
    peer.data(number, framed(b"x")[:3], is_end=False)
    await peer.end_of(number)


@pytest.mark.parametrize("path", [FAST, SLOW])
@pytest.mark.parametrize("way", [answered, reset, left_unfinished, bomb, malformed, expired])
async def test_a_call_is_freed_at_its_end(front: Front, no_collection: None, way, path):
    async with front.peer(WIDE) as peer:
        peer.send(frames.window_update(0, 100 << 20))
        await way(peer, path)
    await until_all_are_freed()


@pytest.mark.parametrize("messages", [0, 2])
async def test_a_stream_is_freed_when_its_client_leaves(front: Front, no_collection: None, messages):
    async with front.peer(WIDE) as peer:
        number = peer.open(STREAM)
        for _ in range(messages):
            peer.data(number, framed(b"x"), is_end=False)
        await answered(peer, SLOW)
    await until_all_are_freed()


@pytest.mark.parametrize("path", [FAST, SLOW])
async def test_a_call_that_waits_for_a_thread_is_freed_when_its_client_leaves(front: Front, no_collection: None, path):
    threads, release, done = front.server._app.threads, threading.Event(), []
    threads.start(b"", lambda: b"%d" % release.wait(PATIENCE_S), done.append)
    async with front.peer(WIDE) as peer:
        number = peer.open(path, GZIP)
        body = framed(BOMB)
        peer.data(number, bytes([1]) + body[1:])
        async with asyncio.timeout(PATIENCE_S):
            while not threads._waiting[b""]:
                await asyncio.sleep(0.01)
        peer.send(frames.rst_stream(number, Reason.CANCEL))
        await answered(peer, SLOW)
    await until_all_are_freed()
    assert not done
    # What the tenant does later is not behind the call that was freed.
    threads.start(b"", lambda: b"later", done.append)
    release.set()
    async with asyncio.timeout(PATIENCE_S):
        while len(done) < 2:
            await asyncio.sleep(0.01)
    assert done == [b"1", b"later"]
    assert not threads._waiting
