"""Requests on a connection of an Envoy whose headers are new: they are decoded when it is their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.h2 import frames, headers, server_connection
from mesh.h2.frames import Reason
from mesh.rpc.framing import framed
from shoal.tenant_header import CONNECTION_HEADER, TENANT_HEADER
from tests.mesh.h2.test_memory_account import Transport
from tests.mesh.h2.test_starts import PATH, Envoy

HEADERS, DATA = frames.HEADERS, frames.DATA
END_HEADERS, END_STREAM = frames.END_HEADERS, frames.END_STREAM


class Calls(Envoy):
    """Calls with headers that no earlier call had."""

    def __init__(self) -> None:
        super().__init__()
        # The first block begins with a table size update.
        self.connection.data_received(b"".join(self.call("a", "1", name, 0.0) for name in ("a", "first")))
        self._made = 0

    async def ready(self) -> Calls:
        """Wait for the first call."""
        await self.settle()
        return self

    def parts(
        self,
        sender: str,
        name: str,
        *,
        pieces: int = 1,
        trailers: bool = False,
        cost_s: float = 0.0,
        tenant: str = "a",
    ) -> list[bytes]:
        """Return the frames of a call with new headers."""
        number, self._next = self._next, self._next + 2
        self._made += 1
        fields = {":method": "POST", ":path": PATH, "content-type": "application/grpc", TENANT_HEADER: tenant}
        fields |= {f"x-new-{self._made}": "x" * 50, CONNECTION_HEADER: sender}
        body = framed(f"{name} {cost_s}".encode().ljust(1_000, b"\0"))
        step = -(-len(body) // pieces)
        parts = [frames.frame(HEADERS, END_HEADERS, number, self._encoder.encode(fields.items()))]
        for at in range(0, len(body), step):
            flags = END_STREAM if at + step >= len(body) and not trailers else 0
            # One byte of padding, and its length.
            parts.append(frames.frame(DATA, flags | frames.PADDED, number, b"\1" + body[at : at + step] + b"\0"))
            parts.append(frames.window_update(number, 10))
        if trailers:
            block = self._encoder.encode([(f"x-trailer-{self._made}", "y")])
            parts.append(frames.frame(HEADERS, END_HEADERS | END_STREAM, number, block))
        return parts

    @property
    def waiting(self) -> int:
        return len(self.connection._later)

    def answer(self) -> None:
        for call in self.calls:
            call.reply((b"x",), 1)

    def assert_empty(self) -> None:
        assert self.memory.bodies.held == 0
        assert not self.waiting
        self.close()


async def test_many_new_headers_of_one_client_do_not_delay_known_ones_or_another_clients():
    envoy = await Calls().ready()
    many = b"".join(b"".join(envoy.parts("1", "many")) for _ in range(39))
    envoy.connection.data_received(many + b"".join(envoy.parts("2", "other")) + envoy.call("a", "3", "known", 0.0))
    assert envoy.waiting > 30
    assert envoy.begun.index("known") < 9, "it is read behind all of them, and starts before them"
    await envoy.settle()
    assert sorted(envoy.begun) == ["a", "first", "known", *["many"] * 39, "other"]
    assert envoy.begun.index("other") < 13
    envoy.answer()
    envoy.assert_empty()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_call_begins_once_with_its_own_body_however_its_frames_arrive(data: st.DataObject):
    async def run() -> None:
        envoy = await Calls().ready()
        names = [f"call-{n}" for n in range(12)]
        queues = [
            envoy.parts(
                data.draw(st.sampled_from("12")),
                name,
                pieces=data.draw(st.integers(1, 3)),
                trailers=data.draw(st.booleans()),
            )
            for name in names
        ]
        # Heads in the order of their numbers; everything else in any order between the calls.
        while any(queues):
            ready = [queue for queue in queues if queue]
            fresh = next((queue for queue in ready if queue[0][3] == HEADERS and queue[0][4] & END_STREAM == 0), None)
            choice = data.draw(st.integers(0, len(ready) - 1))
            queue = ready[choice]
            if queue[0][3] == HEADERS and queue[0][4] & END_STREAM == 0:
                queue = fresh or queue
            envoy.connection.data_received(queue.pop(0))
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
        await envoy.settle()
        assert sorted(envoy.begun) == sorted(["a", "first", *names])
        envoy.answer()
        envoy.assert_empty()

    asyncio.run(run())


async def test_what_waits_is_counted_and_gone_with_its_reset_or_its_connection():
    envoy = await Calls().ready()
    envoy.answer()
    envoy.connection.data_received(b"".join(b"".join(envoy.parts("1", f"call-{n}")) for n in range(20)))
    numbers = list(envoy.connection._later)
    assert envoy.memory.bodies.held > len(numbers) * 9_000
    envoy.connection.data_received(b"".join(frames.rst_stream(number, Reason.CANCEL) for number in numbers[:5]))
    assert envoy.waiting == len(numbers) - 5
    envoy.connection.connection_lost(None)
    assert envoy.memory.bodies.held == 0
    await envoy.settle()
    assert len(envoy.begun) == 22 - len(numbers)


async def test_a_full_memory_opens_calls_at_once(monkeypatch: pytest.MonkeyPatch):
    envoy = await Calls().ready()
    envoy.answer()
    envoy.memory.bodies.limit = 100_000
    envoy.connection.data_received(b"".join(b"".join(envoy.parts("1", f"call-{n}")) for n in range(30)))
    assert envoy.memory.bodies.held <= 100_000
    # Those beyond are refused, as calls are for which there is no memory.
    await envoy.settle()
    assert 5 < len(envoy.begun) < 32
    assert envoy.memory.bodies.refused
    envoy.answer()
    envoy.assert_empty()


async def test_a_malformed_block_that_waited_ends_the_connection():
    envoy = await Calls().ready()
    calls = b"".join(b"".join(envoy.parts("1", f"call-{n}")) for n in range(10))
    # A literal whose name is longer than the block.
    bad = frames.frame(HEADERS, END_HEADERS | END_STREAM, envoy._next, b"\x00\x7f\x00x")
    envoy.connection.data_received(calls + bad)
    assert not envoy.transport.is_closing()
    await envoy.settle()
    assert envoy.transport.is_closing()
    assert b"a malformed header block" in bytes(envoy.transport.written)


async def test_calls_that_wait_at_a_goaway_are_served():
    envoy = await Calls().ready()
    envoy.connection.data_received(b"".join(b"".join(envoy.parts("1", f"call-{n}")) for n in range(10)))
    assert envoy.waiting
    envoy.connection.send_last_goaway()
    await envoy.settle()
    assert len(envoy.begun) == 12
    envoy.answer()
    assert envoy.memory.bodies.held == 0
    envoy.close()


async def test_the_connections_credit_of_a_cancelled_call_returns():
    envoy = await Calls().ready()
    envoy.answer()
    sent = envoy.connection._credit
    for _ in range(3):
        calls = [envoy.parts("1", f"call-{n}", pieces=3) for n in range(20)]
        sent += sum(1_000 + len(framed(b"")) + 2 * 3 for _ in calls)
        numbers = range(envoy._next - 40, envoy._next, 2)
        resets = [frames.rst_stream(number, Reason.CANCEL) for number in numbers]
        envoy.connection.data_received(b"".join(b"".join(call) for call in calls) + b"".join(resets))
    await envoy.settle()
    assert envoy.connection._credit == sent
    assert envoy.memory.bodies.held == 0
    envoy.close()


async def test_a_call_of_many_frames_is_opened_at_once():
    envoy = await Calls().ready()
    fill = b"".join(b"".join(envoy.parts("1", f"call-{n}")) for n in range(4))
    parts = envoy.parts("1", "small"), envoy.parts("1", "many", pieces=100)
    envoy.connection.data_received(fill + parts[0][0] + parts[1][0] + b"".join(parts[1][1:180]))
    assert envoy.waiting == 1, "the one of few frames"
    envoy.connection.data_received(b"".join(parts[1][180:] + parts[0][1:]))
    await envoy.settle()
    assert {"small", "many"} <= set(envoy.begun)
    envoy.answer()
    envoy.assert_empty()


async def test_tenants_share_the_time_of_calls_that_waited_for_their_headers():
    envoy = await Calls().ready()
    of_many = [envoy.parts(str(n), "many", cost_s=0.001) for n in range(20) for _ in range(2)]
    of_few = [envoy.parts("99", f"few-{n}", cost_s=0.001, tenant="b") for n in range(3)]
    envoy.connection.data_received(b"".join(map(b"".join, of_many + of_few)))
    await envoy.settle()
    assert len(envoy.begun) == 2 + 43
    assert envoy.begun.index("few-2") < 16
    envoy.answer()
    envoy.assert_empty()


@pytest.mark.parametrize("place", ["before", "behind"])
async def test_a_client_cannot_take_the_turns_of_another_connection(place: str):
    envoy = await Calls().ready()
    decoder = envoy.connection._decoder
    own = (CONNECTION_HEADER, "17")
    forged = ("x-value", (decoder._connection_name + b"\x81\x67").decode("latin-1"))
    fields = [(":method", "POST"), (":path", PATH), *([forged, own] if place == "before" else [own, forged])]
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    encoder.encode([])
    block = encoder.encode([(name.encode(), value.encode("latin-1")) for name, value in fields], huffman=False)
    name = encoder.encode([own], huffman=False)
    block = block.replace(name, envoy._encoder.encode([own]))
    assert block.count(decoder._connection_name) == 2
    assert decoder.connection_of(block) == envoy._encoder.encode([own])
    envoy.close()


async def test_nothing_is_opened_for_a_connection_that_is_closing():
    envoy = await Calls().ready()
    envoy.connection.data_received(b"".join(b"".join(envoy.parts("1", f"call-{n}")) for n in range(20)))
    begun = len(envoy.begun)
    assert envoy.waiting
    envoy.transport._is_closing = True
    await envoy.settle()
    assert len(envoy.begun) <= begun + 4, "those whose headers were known"
    envoy.connection.connection_lost(None)
    assert envoy.memory.bodies.held == 0


async def test_trailers_that_are_known_open_no_call_before_its_turn():
    envoy = await Calls().ready()
    first, last = envoy.parts("1", "first", trailers=True), []
    envoy.connection.data_received(b"".join(first))
    await envoy.settle()
    for n in range(30):
        parts = envoy.parts("1", f"call-{n}", trailers=True)
        number = envoy._next - 2
        # The trailers of the first call.
        last += [*parts[:-1], first[-1][:5] + number.to_bytes(4, "big") + first[-1][9:]]
    envoy.connection.data_received(b"".join(last))
    assert envoy.waiting == 26
    await envoy.settle()
    assert len(envoy.begun) == 2 + 31
    envoy.answer()
    envoy.assert_empty()


async def test_a_call_without_a_number_does_not_end_the_turns_of_others():
    envoy = Envoy(is_shared=False)
    envoy.connection.data_received(envoy.call("a", "", "own", 0.0))
    assert not envoy.connection._is_shared
    envoy._is_shared = True
    envoy.connection.data_received(envoy.call("a", "1", "other", 0.0))
    assert envoy.connection._is_shared
    envoy.close()


async def test_a_direct_client_speaks_for_nobody_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Transport, "get_extra_info", lambda self, name: ("127.0.0.1", 4242))
    envoy = Envoy()
    envoy.connection.data_received(b"".join(envoy.call("a", str(n), f"call-{n}", 0.0) for n in range(20)))
    assert not envoy.connection._is_shared
    assert {call._stream.client for call in envoy.calls} == {None}
    assert envoy.begun == [f"call-{n}" for n in range(20)]
    envoy.close()


async def test_many_fields_hide_the_number_and_cost_little(monkeypatch: pytest.MonkeyPatch):
    walked = 0

    def field_end(block: bytes, at: int, real: Callable[[bytes, int], int] = headers._field_end) -> int:
        nonlocal walked
        walked += 1
        return real(block, at)

    monkeypatch.setattr(headers, "_field_end", field_end)
    envoy = await Calls().ready()
    decoder = envoy.connection._decoder
    block = decoder._connection_name + b"\x81\x67" + decoder._connection_name + b"\x81\x67" + b"\x82" * 120_000
    walked = 0
    assert decoder.connection_of(block) == b""
    # All its 120,000 fields would take 0.1 s.
    assert walked == headers.LIST_FIELDS
    envoy.close()


async def test_calls_that_are_reset_while_they_wait_leave_nothing():
    envoy = await Calls().ready()
    envoy.answer()
    envoy.begun.clear()
    calls = [envoy.call("a", "1", "slow", 1.0, size=3_000) for _ in range(100)]
    resets = [frames.rst_stream(number, Reason.CANCEL) for number in range(envoy._next - 200, envoy._next, 2)]
    envoy.connection.data_received(b"".join(calls))
    waiting = [start for of in envoy.memory.starts._tenants._by_name.values() for start in of._by_name.values()]
    kept = [start.args for queue in waiting for start in queue]
    assert kept
    assert all(isinstance(argument, int) for arguments in kept for argument in arguments)
    envoy.connection.data_received(b"".join(resets))
    await envoy.settle()
    assert envoy.memory.bodies.held == 0
    envoy.close()


async def test_known_headers_of_a_new_client_are_known():
    envoy = await Calls().ready()
    envoy.connection.data_received(b"".join(envoy.call("a", str(n), f"call-{n}", 0.0) for n in range(10, 60)))
    assert envoy.begun[2:] == [f"call-{n}" for n in range(10, 60)]
    assert not envoy.waiting
    # A number that is no valid value is not taken over.
    call = bytearray(envoy.call("a", "60", "bad", 0.0))
    at = call.index(envoy.connection._decoder._connection_name) + len(envoy.connection._decoder._connection_name)
    call[at + 1 : at + 3] = b"\xff\xff"[: call[at] & 0x7F]
    envoy.connection.data_received(bytes(call))
    await envoy.settle()
    assert "bad" not in envoy.begun
    envoy.close()


async def test_a_direct_client_waits_for_nothing():
    envoy = Envoy(is_shared=False)
    blocks = []
    for number in range(1, 81, 2):
        fields = {":method": "POST", ":path": PATH, "content-type": "application/grpc", f"x-new-{number}": "x"}
        blocks.append(frames.frame(HEADERS, END_HEADERS, number, envoy._encoder.encode(fields.items())))
        blocks.append(frames.frame(DATA, END_STREAM, number, framed(f"call-{number} 0".encode())))
    envoy.connection.data_received(b"".join(blocks))
    await envoy.settle()
    assert envoy.begun == [f"call-{number}" for number in range(1, 81, 2)]
    envoy.close()


def test_the_stated_number_of_new_headers():
    assert server_connection._NEW_BLOCKS == 4
