"""Calls that share a connection, as those of an Envoy do: few cheap ones do not wait for many costly ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from itertools import count
from typing import Any

import grpc
import hpack
import pytest

from mesh.h2 import frames, server_connection
from mesh.h2.frames import Reason
from mesh.h2.server_connection import Memory, ServerConnection
from mesh.h2.starts import TASKS, LeastUsed, Starts
from mesh.h2.turns import Turns
from mesh.rpc.framing import framed
from mesh.rpc.grpc_app import GrpcApp
from shoal.tenant_header import CONNECTION_HEADER, TENANT_HEADER
from tests.clocks import Seconds
from tests.mesh.h2.test_memory_account import Transport

PATH = "/t.T/Call"
STREAM = "/t.T/Stream"


class Envoy:
    """One connection to a server whose calls cost the seconds that their bodies say, without sockets."""

    def __init__(self, *, is_shared: bool = True) -> None:
        clock = Seconds()
        self.memory = Memory()
        self.memory.turns, self.memory.starts = Turns(clock), Starts(clock)
        self.begun: list[str] = []
        self.calls: list[Any] = []
        self._is_shared = is_shared
        self._next = 1
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0

        def handler(body: bytes, call: Any) -> None:
            name, cost = body[5:].strip(b"\0").split()
            self.begun.append(name.decode())
            self.calls.append(call)
            clock.now += float(cost)

        async def stream(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for message in messages:
                yield message

        self.app = GrpcApp({STREAM: grpc.stream_stream_rpc_method_handler(stream)}, {PATH: handler})
        self.connection = ServerConnection(self.app, {}, self.memory)
        self.transport: Any = Transport(self.connection)
        self.connection.connection_made(self.transport)
        self.connection.data_received(
            frames.PREFACE + frames.settings({}) + frames.frame(frames.SETTINGS, frames.ACK, 0)
        )

    def call(
        self, tenant: str, sender: str, name: str, cost_s: float, *, size: int = 0, trailers: int | None = None
    ) -> bytes:
        """Return the frames of a whole call with a body of at least `size` bytes; `trailers`: flags of its trailers."""
        number, self._next = self._next, self._next + 2
        fields = {":method": "POST", ":path": PATH, "content-type": "application/grpc", TENANT_HEADER: tenant}
        fields |= {CONNECTION_HEADER: sender} if self._is_shared else {}
        body = framed(f"{name} {cost_s}".encode().ljust(size, b"\0"))
        block = self._encoder.encode(fields.items())
        head = frames.frame(frames.HEADERS, frames.END_HEADERS, number, block)
        if trailers is None:
            return head + frames.frame(frames.DATA, frames.END_STREAM, number, body)
        last = frames.frame(frames.HEADERS, frames.END_HEADERS | trailers, number, b"\x00\x01x\x01y")
        return head + frames.frame(frames.DATA, 0, number, body) + last

    def stream(self) -> bytes:
        """Return the frames of a stream that begins and has no message yet."""
        number, self._next = self._next, self._next + 2
        fields = {":method": "POST", ":path": STREAM, "content-type": "application/grpc", CONNECTION_HEADER: "1"}
        return frames.frame(frames.HEADERS, frames.END_HEADERS, number, self._encoder.encode(fields.items()))

    async def settle(self) -> None:
        for _ in range(2_000):
            await asyncio.sleep(0)

    def close(self) -> None:
        self.connection.abort()


async def test_few_calls_do_not_start_behind_the_many_of_another_sender_or_tenant():
    envoy = Envoy()
    envoy.connection.data_received(
        b"".join(envoy.call("a", "1", "many", 0.002) for _ in range(60))
        + envoy.call("a", "2", "own", 0.0001)
        + envoy.call("b", "3", "other", 0.0001)
    )
    await envoy.settle()
    assert sorted(envoy.begun) == ["many"] * 60 + ["other", "own"]
    assert envoy.begun.index("own") < 8
    assert envoy.begun.index("other") < 8
    envoy.close()


async def test_calls_that_end_with_trailers_do_not_pass_the_others():
    envoy = Envoy()
    envoy.connection.data_received(
        b"".join(envoy.call("a", "1", f"many-{n}", 0.002, trailers=frames.END_STREAM) for n in range(60))
        + envoy.call("b", "3", "other", 0.0001)
    )
    await envoy.settle()
    assert [name for name in envoy.begun if name != "other"] == [f"many-{n}" for n in range(60)]
    assert envoy.begun.index("other") < 8
    envoy.close()


async def test_a_direct_client_has_its_calls_started_in_their_order():
    envoy = Envoy(is_shared=False)
    names = [f"call-{n}" for n in range(60)]
    envoy.connection.data_received(b"".join(envoy.call("ab"[n % 2], "", name, 0.002) for n, name in enumerate(names)))
    await envoy.settle()
    assert envoy.begun == names
    envoy.close()


async def test_calls_of_one_sender_start_in_the_order_of_their_arrival():
    envoy = Envoy()
    for n in range(100):
        envoy.connection.data_received(envoy.call("a", str(n % 3), f"{n % 3}-{n}", 0.001 * (n % 5)))
    await envoy.settle()
    for sender in "012":
        of_sender = [int(name[2:]) for name in envoy.begun if name.startswith(sender)]
        assert len(of_sender) >= 33
        assert of_sender == sorted(of_sender)
    envoy.close()


async def test_cheap_calls_get_their_share_of_the_time_and_not_of_the_turns():
    envoy = Envoy()
    costly = b"".join(envoy.call("a", str(n), "costly", 0.01) for _ in range(5) for n in range(8))
    envoy.connection.data_received(costly + b"".join(envoy.call("a", "own", "cheap", 0.0001) for _ in range(20)))
    await envoy.settle()
    assert envoy.begun.count("costly") == 40
    last = len(envoy.begun) - envoy.begun[::-1].index("cheap")
    # 20 cheap ones cost less than one costly one. By turns, all costly ones would have been before the last of them.
    assert envoy.begun[:last].count("costly") <= 16
    envoy.close()


@pytest.mark.parametrize("size", [0, 9_000])
async def test_a_cancelled_or_lost_call_does_not_start_and_returns_its_memory(size: int):
    envoy = Envoy()
    envoy.connection.data_received(b"".join(envoy.call("a", "1", f"call-{n}", 1.0, size=size) for n in range(5)))
    assert not envoy.begun
    assert envoy.memory.bodies.held >= 5 * (8192 + size), "what waits is counted"
    for n in (1, 3):
        envoy.connection.data_received(frames.rst_stream(2 * n + 1, Reason.CANCEL))
    await envoy.settle()
    assert envoy.begun == ["call-0", "call-2", "call-4"]
    envoy.connection.data_received(b"".join(envoy.call("a", "1", f"late-{n}", 1.0, size=size) for n in range(4)))
    envoy.connection.connection_lost(None)
    await envoy.settle()
    assert envoy.begun[3:] == ["late-0"]
    assert envoy.memory.bodies.held == 0
    assert not envoy.memory.starts.has(b"a", b"1")


async def test_streams_that_begin_leave_the_event_loop_to_others():
    envoy = Envoy()
    envoy.connection.data_received(b"".join(envoy.stream() for _ in range(200)))
    begun = len(envoy.app.tasks)
    assert 0 < begun <= 32, "each has a task, whose cost follows in the next iteration"
    most = 0
    for _ in range(2_000):
        await asyncio.sleep(0)
        most, begun = max(most, len(envoy.app.tasks) - begun), len(envoy.app.tasks)
    assert begun == 200
    assert most <= 32
    envoy.close()
    await envoy.settle()


@pytest.mark.parametrize("trailers", [None, frames.END_STREAM])
async def test_calls_that_begin_in_tasks_are_few_in_an_iteration_and_others_pass_them(trailers: int | None):
    """A start costs nothing here, as those of tasks do: what they cost follows."""
    envoy = Envoy()
    tasks: list[asyncio.Task[None]] = []

    def in_task(body: bytes, call: Any) -> None:
        name = body[5:].strip(b"\0").split()[0].decode()
        envoy.begun.append(name)
        if name == "many":
            tasks.append(asyncio.create_task(asyncio.sleep(0)))
            call.is_task = True

    envoy.app = GrpcApp({}, {PATH: in_task})
    envoy.connection = ServerConnection(envoy.app, {}, envoy.memory)
    envoy.transport = Transport(envoy.connection)
    envoy.connection.connection_made(envoy.transport)
    envoy.connection.data_received(frames.PREFACE + frames.settings({}) + frames.frame(frames.SETTINGS, frames.ACK, 0))
    envoy.connection.data_received(
        b"".join(envoy.call("a", "1", "many", 0.0, trailers=trailers) for _ in range(60))
        + envoy.call("b", "2", "other", 0.0)
    )
    assert len(tasks) <= TASKS
    most = begun = len(tasks)
    while len(envoy.begun) < 61:
        await asyncio.sleep(0)
        most, begun = max(most, len(tasks) - begun), len(tasks)
    assert most <= 2 * TASKS
    assert envoy.begun.index("other") <= 2 * TASKS
    await asyncio.gather(*tasks)
    envoy.close()
    await envoy.settle()


@pytest.mark.parametrize("is_shared", [True, False])
async def test_resets_of_one_client_do_not_end_an_envoys_connection(is_shared: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_connection, "_RESETS", 1_000)
    # The bucket does not fill again while a slow machine sends.
    monkeypatch.setattr(server_connection, "_RESETS_A_S", 0)
    envoy = Envoy(is_shared=is_shared)
    for _ in range(15):
        resets = [
            (envoy.call("a", "1", "reset", 0.0), frames.rst_stream(envoy._next - 2, Reason.CANCEL)) for _ in range(100)
        ]
        envoy.connection.data_received(b"".join(map(b"".join, resets)))
        await asyncio.sleep(0)
    await envoy.settle()
    assert envoy.connection._resets > 1_000
    assert envoy.transport.is_closing() is not is_shared
    envoy.close()


def test_a_queue_that_empties_each_time_has_no_more_than_its_share():
    """Tenants `a` and `b` use as much time as `c`, whose calls always wait, and `a` has one call at a time."""
    queues: LeastUsed[str] = LeastUsed()
    used = dict.fromkeys("abc", 0.0)
    for name in "abc":
        queues.add(name.encode(), name)
    for _ in range(300):
        name = queues.next()
        cost = {"a": 3.0, "b": 1.0, "c": 1.0}[name]
        used[name] += cost
        queues.used(cost, is_empty=name == "a")
        if name == "a":
            queues.add(b"a", "a")
    assert max(used.values()) - min(used.values()) <= 6
    # Alone, and then not: nothing is saved up, and nothing is owed.
    for _ in range(3):
        queues.next()
        queues.used(0.0, is_empty=True)
    assert not queues
    queues.add(b"a", "a")
    queues.add(b"b", "b")
    assert queues.next() == "a"


def test_new_queues_without_end_keep_no_other_waiting():
    queues: LeastUsed[str] = LeastUsed()
    queues.add(b"old", "old")
    queues.next()
    queues.used(1e-3, is_empty=False)
    number, turns = count(), 0
    for _ in range(4):
        queues.add(b"%d" % next(number), "new")
    for _ in range(10_000):
        is_new = queues.next() == "new"
        turns += not is_new
        queues.used(1e-3, is_empty=is_new)
        if is_new:
            queues.add(b"%d" % next(number), "new")
    assert turns >= 200


async def test_cheap_starts_of_tasks_do_not_keep_a_costly_sender_waiting():
    """Few tasks begin in an iteration: those of other senders count as more than the time of their start."""
    clock = Seconds()
    starts, begun = Starts(clock), []

    def start(name: str, cost_s: float, *, is_task: bool) -> bool:
        begun.append(name)
        clock.now += cost_s
        return is_task

    for _ in range(100):
        for sender in (b"1", b"2", b"3", b"4"):
            starts.add(b"a", sender, partial(start, "task", 2e-5, is_task=True))
    for _ in range(2):
        starts.add(b"a", b"5", partial(start, "costly", 0.005, is_task=False))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(begun) == 402
    first = begun.index("costly")
    assert begun.index("costly", first + 1) - first < 100


async def test_a_start_that_takes_long_by_chance_is_no_debt_for_long():
    clock = Seconds()
    starts, begun = Starts(clock), []

    def start(name: str, cost_s: float) -> bool:
        begun.append(name)
        clock.now += cost_s
        return False

    # As one in which garbage is collected.
    starts.add(b"a", b"1", partial(start, "unlucky", 0.15))
    starts.add(b"a", b"1", partial(start, "next", 1e-4))
    for _ in range(100):
        starts.add(b"b", b"2", partial(start, "other", 1e-3))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(begun) == 102
    assert begun.index("next") < 10


async def test_a_fault_of_one_start_keeps_no_other_call_waiting():
    begun: list[str] = []
    starts = Starts()
    starts.add(b"a", b"1", lambda: 1 // 0)
    starts.add(b"a", b"1", lambda: bool(begun.append("own")))
    starts.add(b"b", b"2", lambda: bool(begun.append("other")))
    for _ in range(10):
        await asyncio.sleep(0)
    assert sorted(begun) == ["other", "own"]


async def test_time_that_another_process_had_counts_for_no_sender():
    begun: list[str] = []
    starts = Starts()

    def start(name: str, *, sleeps_s: float = 0.0, busy_s: float = 0.0) -> bool:
        begun.append(name)
        time.sleep(sleeps_s)
        end = time.thread_time() + busy_s
        while time.thread_time() < end:
            pass
        return False

    # As when another process has the processor while the first call starts.
    starts.add(b"a", b"1", partial(start, "interrupted", sleeps_s=0.05))
    for _ in range(10):
        starts.add(b"b", b"2", partial(start, "costly", busy_s=0.001))
    starts.add(b"a", b"1", partial(start, "next"))
    for _ in range(30):
        await asyncio.sleep(0)
    assert begun.index("next") <= 2
    assert begun.count("costly") == 10
