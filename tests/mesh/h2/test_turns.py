"""Connections take turns: a flood on many of them does not delay the calls of another."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import weakref
from itertools import pairwise, permutations

import hpack
import pytest

from mesh.h2 import frames
from mesh.h2.server_connection import Memory, ServerConnection
from mesh.h2.stream import Application
from mesh.h2.turns import Lot, Turns
from mesh.rpc.framing import framed
from mesh.rpc.grpc_app import GrpcApp
from mesh.rpc.server import Server
from tests.clocks import Seconds
from tests.mesh.h2.test_memory_account import Transport

PATIENCE_S = 30.0
FLOOD, CALL = "/t.T/Flood", "/t.T/Call"
CONNECTIONS, CALLS = 16, 500


def greeting() -> bytes:
    return frames.PREFACE + frames.settings({})


def calls(path: str, count: int, first: int = 1) -> bytes:
    """Return the frames of whole calls, on the streams from `first` on."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    block = encoder.encode({**fields, "content-type": "application/grpc", "te": "trailers"}.items())
    return b"".join(
        frames.frame(frames.HEADERS, frames.END_HEADERS, number, block)
        + frames.frame(frames.DATA, frames.END_STREAM, number, framed(b"x"))
        for number in range(first, first + 2 * count, 2)
    )


def opened(app: Application, memory: Memory) -> ServerConnection:
    """Return a connection without a socket, which has received the client's preface and settings."""
    connection = ServerConnection(app, {}, memory)
    connection.connection_made(Transport(connection))
    connection.data_received(greeting())
    return connection


async def test_a_call_is_not_behind_the_floods_of_other_connections():
    handled: list[str] = []

    def fast(name: str):
        def handler(body, call):
            handled.append(name)
            call.reply((body[5:],), len(body) - 5)

        return handler

    async with Server("127.0.0.1:0", [], drain_ms=500, fast_methods={FLOOD: fast("flood"), CALL: fast("call")}) as one:
        await one.serve()
        host, _, port = one.address.rpartition(":")
        peers = [socket.create_connection((host, int(port))) for _ in range(CONNECTIONS + 1)]
        # Everything is there before the server reads any of it.
        for peer in peers[:-1]:
            peer.sendall(greeting() + calls(FLOOD, CALLS))
        peers[-1].sendall(greeting() + calls(CALL, 1))
        async with asyncio.timeout(PATIENCE_S):
            while len(handled) < CONNECTIONS * CALLS + 1:
                await asyncio.sleep(0.005)
        for peer in peers:
            peer.close()
    # Some of each connection, and some turns.
    assert handled.index("call") < CONNECTIONS * 40


class Endless:
    """A connection whose frames cost `frame_s` each, and never end."""

    lot = Lot.SHORT

    def __init__(self, turns: Turns, clock: Seconds, frame_s: float) -> None:
        self._turns, self._clock, self._frame_s = turns, clock, frame_s
        self.used_s = 0.0
        self.taken: list[int] = []
        self.is_lost = False

    def take_turn(self, count: int) -> bool:
        if self.is_lost:
            return False
        self.taken.append(count)
        self._clock.now += count * self._frame_s
        self._turns.wait(self)
        return True


async def turned(*costs: float, iterations: int = 40) -> list[Endless]:
    clock = Seconds()
    turns = Turns(clock)
    connections = [Endless(turns, clock, cost) for cost in costs]
    for connection in connections:
        turns.wait(connection)
    for _ in range(iterations):
        await asyncio.sleep(0)
    for connection in connections:
        connection.is_lost = True
    for _ in range(3):
        await asyncio.sleep(0)
    assert turns.at_once > 0
    return connections


async def test_turns_grow_while_they_are_short_and_shrink_after_a_long_one():
    [cheap] = await turned(1e-6)
    assert cheap.taken[-1] == 512
    [dear] = await turned(1e-3)
    assert dear.taken[0] == 64
    assert dear.taken[-1] == 16


async def test_turns_do_not_shrink_while_other_processes_use_the_processor():
    class Interrupted(Endless):
        def take_turn(self, count: int) -> bool:
            # As when another process has the processor meanwhile: on a clock, it is a long iteration.
            time.sleep(0.02)
            return super().take_turn(count)

    turns = Turns()
    connection = Interrupted(turns, Seconds(), 0.0)
    turns.wait(connection)
    for _ in range(20):
        await asyncio.sleep(0)
    connection.is_lost = True
    assert connection.taken[-1] == 512
    # Nor is its next data too costly to be handled at once, or that of others.
    began = turns.clock()
    time.sleep(0.02)
    took_s = turns.spent_since(began)
    assert not turns.must_wait(100_000, took_s)
    for _ in range(3):
        await asyncio.sleep(0)


async def test_connections_take_turns():
    one, two, three = await turned(1e-6, 1e-6, 1e-6, iterations=30)
    assert abs(len(one.taken) - len(two.taken)) <= 1
    assert abs(len(two.taken) - len(three.taken)) <= 1


async def test_short_turns_are_in_one_iteration_and_a_long_one_has_its_own():
    short = await turned(*[1e-7] * 8, iterations=30)
    assert all(28 <= len(each.taken) <= 32 for each in short)
    long = await turned(*[1e-3] * 8, iterations=30)
    assert 28 <= sum(len(each.taken) for each in long) <= 32


async def test_a_connection_whose_turns_take_little_has_more_of_them():
    *costly, cheap = await turned(*[1e-3] * 8, 1e-5, iterations=500)
    # It has one in each iteration, but for some at the begin. The others have equal shares, but for one turn.
    assert len(cheap.taken) > 450
    used = [each.used_s for each in costly]
    assert max(used) - min(used) < 0.0051


async def test_a_connection_that_comes_back_has_saved_no_turns():
    clock = Seconds()
    turns = Turns(clock)
    old, back = Endless(turns, clock, 1e-3), Endless(turns, clock, 1e-3)
    turns.wait(back)
    await asyncio.sleep(0)
    back.is_lost = True
    turns.wait(old)
    for _ in range(50):
        await asyncio.sleep(0)
    back.is_lost = False
    turns.wait(back)
    before = len(old.taken)
    for _ in range(20):
        await asyncio.sleep(0)
    assert 9 <= len(old.taken) - before <= 11
    old.is_lost = back.is_lost = True
    for _ in range(3):
        await asyncio.sleep(0)


class Once(Endless):
    """A connection that has sent all in its first turn."""

    lot = Lot.DIRECT

    def take_turn(self, count: int) -> bool:
        self.taken.append(count)
        self._clock.now += count * self._frame_s
        return True


async def test_new_connections_without_end_keep_no_other_waiting():
    clock = Seconds()
    turns = Turns(clock)
    old = Endless(turns, clock, 1e-5)
    turns.wait(old)
    for _ in range(10):
        await asyncio.sleep(0)
    new: list[Once] = []
    for _ in range(200):
        before = len(old.taken)
        # Its turn counts 5 ms, and each new one begins 1 ms behind.
        for _ in range(25):
            new = [each for each in new if not each.taken]
            while len(new) < 4:
                new.append(Once(turns, clock, 1e-4))
                turns.wait(new[-1])
            await asyncio.sleep(0)
        assert len(old.taken) > before
    old.is_lost = True
    for _ in range(10):
        await asyncio.sleep(0)


async def test_connections_that_come_and_go_are_not_kept():
    """Each is lost after its first turn, with calls that wait."""
    memory, clock = Memory(), Seconds()
    memory.turns = Turns(clock)

    def slow(body, call):
        clock.now += 1e-4

    app = GrpcApp({}, {CALL: slow})
    bystander = opened(app, memory)
    bystander.data_received(calls(CALL, 400))
    for _ in range(6):
        await asyncio.sleep(0)
    lost, new = [], {}
    for _ in range(200):
        for connection in [each for each, newest in new.items() if each._newest > newest]:
            del new[connection]
            connection.connection_lost(None)
            lost.append(weakref.ref(connection))
            del connection
        while len(new) < 4:
            connection = opened(app, memory)
            connection.data_received(calls(CALL, 120))
            new[connection] = connection._newest
            del connection
        await asyncio.sleep(0)
    gc.collect()
    assert len(lost) > 50
    assert sum(each() is not None for each in lost) < 20
    for connection in (*new, bystander):
        connection.abort()
    for _ in range(500):
        await asyncio.sleep(0)


@pytest.mark.parametrize("cost_s", [1e-9, 3e-3])
async def test_a_connection_waits_for_at_most_twenty_turns_of_each_other_one(cost_s):
    """Turns may take nothing, as those that let the transport be read again. Each has an iteration of its own."""

    class Alone(Endless):
        lot = Lot.DIRECT

    clock = Seconds()
    turns = Turns(clock)
    others = [Alone(turns, clock, cost_s) for _ in range(20)]
    one = Alone(turns, clock, 3e-5)
    for each in (one, *others):
        turns.wait(each)
    waits, last = [], 0
    for iteration in range(20_000):
        await asyncio.sleep(0)
        if len(one.taken) > len(waits):
            waits.append(iteration - last)
            last = iteration
    assert len(waits) > 40
    assert max(waits) <= 20 * len(others) + 1
    for each in (one, *others):
        each.is_lost = True
    for _ in range(30):
        await asyncio.sleep(0)


async def test_a_turn_that_takes_long_by_chance_is_no_debt_for_long():
    """As one in which garbage is collected."""

    class Unlucky(Endless):
        def take_turn(self, count: int) -> bool:
            if len(self.taken) == 20:
                clock.now += 0.15
            return super().take_turn(count)

    clock = Seconds()
    turns = Turns(clock)
    others = [Endless(turns, clock, 1e-4) for _ in range(50)]
    one = Unlucky(turns, clock, 1e-5)
    for each in (one, *others):
        turns.wait(each)
    waits, last = [], clock.now
    for _ in range(4_000):
        await asyncio.sleep(0)
        if len(one.taken) > len(waits):
            waits.append(clock.now - last)
            last = clock.now
    assert len(waits) > 21
    assert max(waits) < 1
    for each in (one, *others):
        each.is_lost = True
    for _ in range(60):
        await asyncio.sleep(0)


async def test_lost_connections_that_had_waited_cost_no_iteration():
    memory = Memory()
    memory.turns = Turns(lambda: 1.0)
    app = GrpcApp({}, {CALL: lambda body, call: call.reply((b"",), 0)})
    lost = [opened(app, memory) for _ in range(100)]
    for each in lost:
        each.data_received(calls(CALL, 100))
    for each in lost:
        each.connection_lost(None)
    bystander = opened(app, memory)
    bystander.data_received(calls(CALL, 30))
    iterations = 0
    while bystander._newest < 59:
        await asyncio.sleep(0)
        iterations += 1
    assert iterations < 10
    bystander.abort()
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_lost_connection_costs_no_turn():
    clock = Seconds()
    turns = Turns(clock)
    lost, alive = Endless(turns, clock, 1e-6), Endless(turns, clock, 1e-6)
    lost.lot = alive.lot = Lot.DIRECT
    lost.is_lost = True
    turns.wait(lost)
    turns.wait(alive)
    await asyncio.sleep(0)
    assert alive.taken
    alive.is_lost = True
    await asyncio.sleep(0)


async def test_a_fault_of_a_connection_does_not_end_the_turns_of_others():
    clock = Seconds()
    turns = Turns(clock)

    class Faulty(Endless):
        def take_turn(self, count: int) -> bool:
            super().take_turn(count)
            raise RuntimeError("a fault")

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    alive, faulty = Endless(turns, clock, 1e-6), Faulty(turns, clock, 1e-6)
    turns.wait(faulty)
    turns.wait(alive)
    for _ in range(4):
        await asyncio.sleep(0)
    assert alive.taken
    # It waits again before it fails: it has its next turn, too.
    assert len(faulty.taken) > 1
    alive.is_lost = True
    faulty.take_turn = lambda count: False  # type: ignore[method-assign]
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_connection_that_waits_again_later_has_its_turn():
    turns = Turns(Seconds())
    taken: list[int] = []

    class Brief:
        used_s, lot = 0.0, Lot.DIRECT

        def take_turn(self, count: int) -> bool:
            taken.append(count)
            return False

    one = Brief()
    for turn in (1, 2, 3):
        turns.wait(one)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(taken) == turn


async def test_a_connection_saves_nothing_in_iterations_that_it_shares():
    clock = Seconds()
    turns = Turns(clock)
    one, other = Endless(turns, clock, 1e-9), Endless(turns, clock, 1e-6)
    turns.wait(one)
    turns.wait(other)
    for _ in range(10_000):
        await asyncio.sleep(0)
    # Now each of its turns is an iteration.
    one._frame_s = 1e-4
    for _ in range(10):
        before = len(other.taken)
        for _ in range(45):
            await asyncio.sleep(0)
        assert len(other.taken) > before
    one.is_lost = other.is_lost = True
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_lost_connection_that_had_waited_waits_once():
    memory, app = Memory(), Holding(1 << 10)
    memory.turns = Turns(lambda: 1.0)
    lost = opened(app, memory)
    lost.data_received(calls(CALL, 200))
    for _ in range(2):
        await asyncio.sleep(0)
    assert lost._is_waiting
    lost.connection_lost(None)
    assert sum(len(queue._heap) for queue in memory.turns._queues.values()) == 1
    begun = lost._newest // 2 + 1
    for _ in range(20):
        await asyncio.sleep(0)
    assert app.left == begun


@pytest.mark.parametrize("had_waited", [False, True])
async def test_of_lost_connections_of_an_envoy_one_is_freed_in_an_iteration(had_waited):
    memory, app = Memory(), Holding(1 << 10)
    memory.turns = Turns(lambda: 1.0)
    lost = [opened(app, memory) for _ in range(4)]
    for each in lost:
        each.data_received(calls(CALL, 200))
    for _ in range(50):
        await asyncio.sleep(0)
    for each in lost:
        each._is_shared, each.lot = True, Lot.SHORT
    for each in lost[:2] if had_waited else ():
        each.data_received(frames.window_update(0, 1) * 2_000)
        assert each._is_waiting
    for each in lost:
        each.connection_lost(None)
    left = [len(each._lost) for each in lost]
    assert min(left) > 100
    while any(left):
        await asyncio.sleep(0)
        now = [len(each._lost) for each in lost]
        assert sum(one != other for one, other in zip(left, now, strict=True)) == 1
        left = now


async def test_of_connections_that_send_at_the_same_time_one_begins_many_calls_and_the_others_few():
    memory, begun = Memory(), []
    memory.turns = Turns(lambda: 1.0)
    paths = [f"/t.T/{n}" for n in range(8)]
    app = GrpcApp({}, {path: lambda body, call, path=path: begun.append(path) for path in paths})
    connections = [opened(app, memory) for _ in paths]
    for path, connection in zip(paths, connections, strict=True):
        connection.data_received(calls(path, 30))
    # Two frames are a call, and 64 frames the most at first.
    assert [begun.count(path) for path in paths] == [30, *(8,) * 7]
    for _ in range(10):
        await asyncio.sleep(0)
    assert [begun.count(path) for path in paths] == [30] * 8
    # The next iteration begins anew, also when nothing waits.
    connections[1].data_received(calls(paths[1], 20, first=101))
    assert begun.count(paths[1]) == 50
    await asyncio.sleep(0)
    connections[2].data_received(calls(paths[2], 20, first=101))
    assert begun.count(paths[2]) == 50
    for connection in connections:
        connection.abort()
    for _ in range(3):
        await asyncio.sleep(0)


async def turns_together(monkeypatch: pytest.MonkeyPatch, *, is_shared: bool, padding: int = 0) -> int:
    """Let 8 connections with short calls wait; return the most turns in one iteration."""
    taken: list[ServerConnection] = []
    take_turn = ServerConnection.take_turn

    def noted(connection: ServerConnection, most: int) -> bool:
        taken.append(connection)
        return take_turn(connection, most)

    memory = Memory()
    memory.turns = Turns(lambda: 1.0)
    app = GrpcApp({}, {CALL: lambda body, call: None})
    connections = [opened(app, memory) for _ in range(8)]
    filler = frames.frame(0xBE, 0, 0, bytes(16_000))
    for connection in connections:
        # An Envoy's connection is one from its first call with a client's number on.
        connection._is_shared = is_shared
        connection.data_received(calls(CALL, 400) + filler * padding)
    most = 0
    with monkeypatch.context() as patch:
        patch.setattr(ServerConnection, "take_turn", noted)
        for _ in range(5):
            taken.clear()
            await asyncio.sleep(0)
            most = max(most, len(taken))
            assert len(set(taken)) == len(taken)
    for connection in connections:
        connection.abort()
    # One turn in each iteration ends the requests of a connection.
    for _ in range(20):
        await asyncio.sleep(0)
    return most


async def test_only_connections_of_an_envoy_share_an_iteration(monkeypatch):
    """Connections of an Envoy share an iteration: `Starts` bounds the tasks of their calls, and of no others."""
    assert await turns_together(monkeypatch, is_shared=False) == 1
    assert await turns_together(monkeypatch, is_shared=True) == 8
    # Those with much data do not share it with each other.
    assert await turns_together(monkeypatch, is_shared=True, padding=50) == 1


async def test_connections_wait_for_turns_of_their_own_kind():
    """With one turn of any kind in an iteration, a direct connection fell behind uploads, whose turns cost less."""
    clock = Seconds()
    turns = Turns(clock)
    uploads = [Endless(turns, clock, 1e-9) for _ in range(8)]
    for each in uploads:
        each.lot = Lot.MUCH
    direct = [Endless(turns, clock, 5e-7) for _ in range(2)]
    for each in direct:
        each.lot = Lot.DIRECT
    short = [Endless(turns, clock, 1e-7) for _ in range(2)]
    everyone = (*uploads, *direct, *short)
    for each in everyone:
        turns.wait(each)
    for iteration in range(1, 401):
        await asyncio.sleep(0)
        assert sum(len(each.taken) for each in uploads) == iteration
        assert sum(len(each.taken) for each in direct) == iteration
        assert [len(each.taken) for each in short] == [iteration] * 2
    # Those of a kind have equal shares.
    assert {len(each.taken) for each in uploads} == {50}
    assert {len(each.taken) for each in direct} == {200}
    await lost(*everyone)


async def lost(*connections: Endless) -> None:
    for each in connections:
        each.is_lost = True
    for _ in range(2 * len(connections)):
        await asyncio.sleep(0)


def of_kind(lot: Lot, turns: Turns, clock: Seconds, *costs: float) -> list[Endless]:
    """Return connections of a kind that wait."""
    found = [Endless(turns, clock, cost) for cost in costs]
    for each in found:
        each.lot = lot
        turns.wait(each)
    return found


@pytest.mark.parametrize("other", [Lot.SHORT, Lot.MUCH])
@pytest.mark.parametrize("cost_s", [1e-3, 1e-6])
async def test_a_connection_with_little_waits_for_few_turns_of_its_kind_beside_others(cost_s, other):
    """With one count of time for all kinds, that of the faster one, it waited behind all of its own that flood."""
    clock = Seconds()
    turns = Turns(clock)
    floods = of_kind(Lot.DIRECT, turns, clock, *[cost_s] * 10) + of_kind(other, turns, clock, 2e-6)
    [light] = of_kind(Lot.DIRECT, turns, clock, 1e-6)
    waits = []
    for _ in range(50):
        before, iterations = len(light.taken), 0
        while len(light.taken) == before:
            await asyncio.sleep(0)
            iterations += 1
        waits.append(iterations)
        # It has a rest.
        light.is_lost = True
        for _ in range(30):
            await asyncio.sleep(0)
        light.is_lost = False
        turns.wait(light)
    assert max(waits[5:]) <= 4
    await lost(light, *floods)


async def test_connections_of_a_kind_share_time_beside_another_kind():
    clock = Seconds()
    turns = Turns(clock)
    [upload] = of_kind(Lot.MUCH, turns, clock, 1e-7)
    dear, cheap = of_kind(Lot.DIRECT, turns, clock, 5e-5, 1e-6)
    for _ in range(2_000):
        await asyncio.sleep(0)
    # A turn of 16 frames takes 0.8 ms, and the least that counts is 0.25.
    assert len(cheap.taken) > 2 * len(dear.taken)
    await lost(upload, dear, cheap)


@pytest.mark.parametrize("kinds", list(permutations(Lot, 2)))
async def test_costly_turns_of_one_kind_keep_no_other_waiting(kinds):
    clock = Seconds()
    turns = Turns(clock)
    floods = of_kind(kinds[0], turns, clock, *[1e-3] * 100)
    [other] = of_kind(kinds[1], turns, clock, 1e-6)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(other.taken) >= 33
    await lost(other, *floods)


async def test_what_waits_makes_the_kind_of_a_connection():
    memory, app = Memory(), GrpcApp({}, {CALL: lambda body, call: None})
    memory.turns = Turns(lambda: 1.0)
    # As after other connections' costly data.
    memory.turns._spent_s = 1.0
    for is_shared, size, lot in [
        (False, 5_000, Lot.DIRECT),
        (False, 100_000, Lot.DIRECT),
        (True, 5_000, Lot.SHORT),
        (True, 100_000, Lot.MUCH),
    ]:
        connection = opened(app, memory)
        connection._is_shared = is_shared
        connection.data_received(bytes(size))
        assert connection._is_waiting
        assert connection.lot is lot
        connection.abort()


async def test_a_connection_has_one_turn_in_an_iteration():
    clock = Seconds()
    turns = Turns(clock)
    connections = [Endless(turns, clock, cost) for cost in (1e-9, 1e-6, 1e-6)]
    for each in connections:
        turns.wait(each)
    for _ in range(50):
        before = [len(each.taken) for each in connections]
        await asyncio.sleep(0)
        assert all(len(each.taken) <= had + 1 for each, had in zip(connections, before, strict=True))
    for each in connections:
        each.is_lost = True
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_connection_whose_calls_take_long_stops_early():
    memory, clock, begun = Memory(), Seconds(), []
    memory.turns = Turns(clock)

    def slow(body, call):
        begun.append(call)
        clock.now += 0.001

    connection = opened(GrpcApp({}, {CALL: slow}), memory)
    connection.data_received(calls(CALL, 30))
    # Two parts of 16 frames. Without the check, 64 frames were handled at once.
    assert len(begun) == 16
    for _ in range(10):
        before = len(begun)
        await asyncio.sleep(0)
        assert len(begun) - before <= 16
    assert len(begun) == 30
    connection.abort()
    await asyncio.sleep(0)


async def test_costly_data_of_many_connections_waits_and_small_calls_do_not():
    memory, clock, begun = Memory(), Seconds(), []
    memory.turns = Turns(clock)

    def costly(body, call):
        begun.append("costly")
        clock.now += 0.002

    app = GrpcApp({}, {FLOOD: costly, CALL: lambda body, call: begun.append("call")})
    connections = [opened(app, memory) for _ in range(100)]
    *attackers, bystander = connections
    # As when the event loop reads them in one iteration.
    padding = frames.frame(0xBE, 0, 0, bytes(8_000))
    for attacker in attackers:
        attacker.data_received(padding + calls(FLOOD, 1))
    bystander.data_received(calls(CALL, 1))
    assert begun == [*["costly"] * 3, "call"]
    while begun.count("costly") < len(attackers):
        before, number = len(begun), 2 * len(begun) + 1
        bystander.data_received(calls(CALL, 1, first=number))
        assert begun[before:] == ["call"]
        await asyncio.sleep(0)
        assert before < len(begun) <= before + 2
    for connection in connections:
        connection.abort()
    for _ in range(3):
        await asyncio.sleep(0)


class Holding:
    """An application whose requests hold memory until their client leaves."""

    def __init__(self, size: int) -> None:
        self.size, self.left = size, 0

    def request(self, stream):
        assert stream.reserve(self.size)
        return self

    def data(self, piece, size, *, is_end): ...

    def disconnected(self):
        self.left += 1


async def test_requests_of_a_lost_connection_that_hold_much_end_one_in_an_iteration():
    memory = Memory()
    for size, most in ((5 << 20, 1), (1 << 10, 64)):
        app = Holding(size)
        connection = ServerConnection(app, {}, memory)
        connection.connection_made(Transport(connection))
        connection.data_received(greeting() + calls(CALL, 20))
        for _ in range(5):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        assert not memory.bodies.held
        ended = [app.left]
        while app.left < 20:
            await asyncio.sleep(0)
            ended.append(app.left)
        steps = [after - before for before, after in pairwise([0, *ended])]
        assert max(steps) <= most
        assert len([step for step in steps if step]) == 20 if most == 1 else len(steps) <= 4


async def test_of_several_lost_connections_one_ends_requests_in_an_iteration():
    memory, app = Memory(), Holding(5 << 20)
    connections = [opened(app, memory) for _ in range(4)]
    for connection in connections:
        connection.data_received(calls(CALL, 4))
        connection._is_shared = True
    for _ in range(5):
        await asyncio.sleep(0)
    for connection in connections:
        connection.connection_lost(None)
    async with asyncio.timeout(PATIENCE_S):
        while app.left < 16:
            before = app.left
            await asyncio.sleep(0)
            assert app.left - before <= 1


async def test_calls_of_an_unknown_method_cost_no_task():
    memory, app = Memory(), GrpcApp({}, {})
    connection = ServerConnection(app, {}, memory)
    transport = Transport(connection)
    connection.connection_made(transport)
    connection.data_received(greeting() + calls("/t.T/None", 10))
    assert not app.tasks
    assert transport.written.count(b"does not implement /t.T/None") == 10
    assert not memory.bodies.held
    connection.abort()
    await asyncio.sleep(0)


async def test_connections_that_send_much_are_read_one_after_the_other():
    """libuv reads 8 MiB of a connection in one iteration of the event loop, unless the connection is paused."""
    memory = Memory()
    app = GrpcApp({}, {CALL: lambda body, call: None})
    transports = []
    for _ in range(4):
        connection = ServerConnection(app, {}, memory)
        transports.append(transport := Transport(connection))
        connection.connection_made(transport)
        piece = frames.frame(frames.DATA, 0, 1, bytes(frames.DEFAULT_FRAME))
        connection.data_received(greeting() + calls(CALL, 1).partition(frames.frame(0, 1, 1, framed(b"x")))[0])
        assert transport.is_reading
        connection.data_received(piece * 8)
        assert not transport.is_reading
    for reading in range(1, 5):
        await asyncio.sleep(0)
        assert [transport.is_reading for transport in transports] == [n < reading for n in range(4)]
    for transport in transports:
        transport.abort()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not memory.bodies.held
