"""Large bodies on a connection of an Envoy: few have credit at a time, so that a small body is sent soon."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.h2 import credits, frames
from mesh.h2.credits import GIVEN_BYTES, SHARED_WINDOW, STEP_BYTES, Credits
from mesh.rpc.framing import PREFIX
from shoal.tenant_header import CONNECTION_HEADER, TENANT_HEADER
from tests.mesh.h2.test_starts import PATH, Envoy

WHOLE = 384 << 10
AT_MOST = GIVEN_BYTES + SHARED_WINDOW


class Uploads(Envoy):
    """Large bodies, of which an Envoy sends what it has credit for."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: dict[int, int] = {}
        self.sent: dict[int, int] = {}
        self._seen = 0

    def begin(self, sender: str) -> int:
        """Begin a body, and send as much as fits its first window."""
        number, self._next = self._next, self._next + 2
        fields = {":method": "POST", ":path": PATH, "content-type": "application/grpc", TENANT_HEADER: "a"}
        block = self._encoder.encode((fields | {CONNECTION_HEADER: sender}).items())
        self.connection.data_received(frames.frame(frames.HEADERS, frames.END_HEADERS, number, block))
        self.windows[number], self.sent[number] = SHARED_WINDOW, 0
        self.send(number)
        return number

    def send(self, number: int) -> None:
        """Send a body as far as there is credit."""
        while (size := min(self.windows[number], WHOLE - self.sent[number], frames.DEFAULT_FRAME)) > 0:
            start = PREFIX.pack(0, WHOLE - 5) + b"large 0" if not self.sent[number] else b""
            self.windows[number] -= size
            self.sent[number] += size
            is_last = self.sent[number] == WHOLE
            data = start.ljust(size, b"\0")
            self.connection.data_received(frames.frame(frames.DATA, is_last and frames.END_STREAM, number, data))
        self.read()

    def read(self) -> None:
        """Read the credit that has come."""
        written = bytes(self.transport.written)
        at = self._seen
        while at < len(written):
            high, low, kind, _, number = frames.HEADER.unpack_from(written, at)
            end = at + frames.HEADER_BYTES + (high << 16 | low)
            if kind == frames.WINDOW_UPDATE and number in self.windows:
                self.windows[number] += int.from_bytes(written[end - 4 : end])
            at = end
        self._seen = at

    @property
    def credit(self) -> int:
        """Credit that all bodies have, and have not used."""
        return sum(self.windows.values())


async def test_few_of_many_large_bodies_have_credit_at_a_time():
    envoy = Uploads()
    numbers = [envoy.begin("1") for _ in range(200)]
    assert STEP_BYTES < envoy.credit <= AT_MOST
    while any(envoy.sent[number] < WHOLE for number in numbers):
        ready = [number for number in numbers if envoy.windows[number] and envoy.sent[number] < WHOLE]
        assert ready, "no body has credit, and none is whole"
        envoy.send(ready[0])
        # A body that is whole has credit that it never uses.
        assert sum(envoy.windows[number] for number in numbers if envoy.sent[number] < WHOLE) <= AT_MOST
    await envoy.settle()
    assert envoy.begun == ["large"] * 200
    envoy.close()


async def test_a_body_that_is_alone_has_a_larger_window_until_others_come():
    envoy = Uploads()
    alone = envoy.begin("1")
    while envoy.windows[alone] <= SHARED_WINDOW:
        assert envoy.sent[alone] < WHOLE
        envoy.send(alone)
    assert envoy.windows[alone] <= GIVEN_BYTES // 2
    for _ in range(200):
        envoy.begin("2")
    assert envoy.credit <= AT_MOST + GIVEN_BYTES // 2
    while envoy.sent[alone] < WHOLE:
        envoy.send(alone)
    await envoy.settle()
    assert envoy.begun == ["large"]
    envoy.close()


async def test_a_sender_of_one_body_does_not_wait_for_all_bodies_of_another_sender():
    envoy = Uploads()
    many = [envoy.begin("1") for _ in range(200)]
    one = envoy.begin("2")
    turns = 0
    while envoy.sent[one] < WHOLE:
        envoy.send(one)
        ready = [number for number in many if envoy.windows[number] and envoy.sent[number] < WHOLE]
        envoy.send(ready[0])
        turns += 1
    # Every second turn is the sender's own, with STEP_BYTES or more.
    assert turns < 3 * WHOLE // STEP_BYTES
    assert sum(envoy.sent[number] for number in many) < 200 * SHARED_WINDOW + (turns + 1) * GIVEN_BYTES // 2
    envoy.close()


async def test_bodies_that_send_nothing_hold_up_others_for_a_moment_only():
    envoy = Uploads()
    silent = [envoy.begin("1") for _ in range(200)]
    other = envoy.begin("1")
    async with asyncio.timeout(30):
        while not envoy.windows[other]:
            await asyncio.sleep(0.01)
            envoy.read()
    assert all(envoy.sent[number] == SHARED_WINDOW for number in silent)
    envoy.close()


async def test_a_client_that_hoards_credit_delays_no_other_clients_body():
    envoy = Uploads()
    for _ in range(100):
        envoy.begin("1")
    one = envoy.begin("2")
    # The first client sends nothing more, and nothing of its credit is forgotten meanwhile.
    while envoy.sent[one] < WHOLE:
        assert envoy.windows[one]
        envoy.send(one)
    await envoy.settle()
    assert envoy.begun == ["large"]
    envoy.close()


async def test_bodies_that_end_early_leave_their_credit_to_others():
    envoy = Uploads()
    numbers = [envoy.begin("1") for _ in range(100)]
    for number in numbers[:-1]:
        envoy.connection.data_received(frames.rst_stream(number, frames.Reason.CANCEL))
    envoy.read()
    assert envoy.windows[numbers[-1]] >= STEP_BYTES
    envoy.close()


async def test_a_body_that_waits_for_credit_has_not_stalled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(credits, "GIVEN_BYTES", 0)
    envoy = Uploads()
    envoy.begin("1")
    for _ in range(20):
        envoy.connection._tick()
    assert not envoy.connection.is_idle
    envoy.close()


# -- any order


@dataclass(eq=False)
class Body:
    number: int
    sender: str
    left: int = SHARED_WINDOW
    extra: int = 0
    is_over: bool = False

    def give_credit(self, extra: int) -> int:
        if self.is_over:
            return 0
        # As if all that came had been consumed.
        gone = SHARED_WINDOW + self.extra - self.left
        size = max(gone + extra - self.extra, 0)
        self.extra += size - gone
        self.left += size
        return self.left


STEPS = st.tuples(st.sampled_from(["wait", "arrive", "end", "forget"]), st.integers(0, 8), st.integers(1, 3))


@given(st.lists(STEPS, max_size=80))
def test_credit_is_counted_once_however_bodies_wait_and_end(steps: list[tuple[str, int, int]]):
    """With room for three bodies at a time, and three senders."""

    async def run() -> None:
        counted: Any = Credits()
        bodies = [Body(number, "abc"[number % 3]) for number in range(9)]
        for kind, number, size in steps:
            body = bodies[number]
            if kind == "wait" and not body.is_over:
                counted.wait(body)
            elif kind == "arrive" and not body.is_over and body.left:
                came = min(size * SHARED_WINDOW // 4, body.left)
                body.left -= came
                if number in counted.bodies:
                    counted.arrived(number, came)
            elif kind == "end":
                body.is_over = True
                if number in counted.bodies:
                    counted.ended(number)
            elif kind == "forget":
                counted._forget_unused()
            entries = counted.bodies.values()
            assert counted._bytes == sum(entry.given for entry in entries)
            assert all(entry.given in (0, entry.body.left) for entry in entries)
            assert counted._extra_bytes == sum(body.extra for body in bodies if not body.is_over)
            assert counted._extra_bytes <= credits.GIVEN_BYTES // 2
            with_credit = [entry.sender for entry in entries if entry.given]
            assert counted._with == {sender: with_credit.count(sender) for sender in with_credit}
            # Nobody waits while there is credit to give, and no sender without any.
            waiting = {one.sender for one in bodies if counted.is_waiting(one.number)}
            assert not waiting or counted._bytes >= credits.GIVEN_BYTES
            assert waiting <= set(with_credit)
            assert waiting == set(counted._waiting)
            assert not counted._without
        for number in list(counted.bodies):
            if number in counted.bodies:
                counted.ended(number)
        assert (counted._bytes, counted._extra_bytes, counted._with, counted._waiting) == (0, 0, {}, {})
        counted.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credits, "GIVEN_BYTES", 3 * SHARED_WINDOW)
        asyncio.run(run())
