"""Deadlines of fast calls: one call that fails at its end keeps no other call alive."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

from mesh.rpc.fast_call import Deadlines, FastCall
from tests.breakable import until


class Stream:
    """The stream of a call with a deadline."""

    def __init__(self) -> None:
        self.head = SimpleNamespace(by_name={b"grpc-timeout": b"1m"}, path="/m")
        self.responses = self.held = 0

    def hold(self, size: int) -> bool:
        return True

    def release(self, size: int) -> None: ...

    def consumed(self, size: int) -> None: ...

    def respond(self, head: bytes, body: bytes = b"", trailers: bytes = b"") -> None:
        self.responses += 1


async def test_a_call_that_fails_at_its_deadline_leaves_the_deadlines_of_others_in_force(caplog):
    clock = asyncio.get_running_loop().time
    app: Any = SimpleNamespace(message_bytes=1 << 20, clock=clock, deadlines=Deadlines(clock), tracer=None, access=None)
    ended: list[int] = []

    def call(number: int) -> Stream:
        def end() -> None:
            ended.append(number)
            if number % 2:
                raise RuntimeError(f"call {number} failed at its end")

        def handle(body: bytes, call: FastCall) -> None:
            call.on_end = end

        stream: Any = Stream()
        FastCall(app, handle, stream).data(bytes(5), 5, is_end=True)
        return stream

    streams = [call(number) for number in range(6)]
    await until(lambda: len(ended) == 6)
    later = call(6)
    await until(lambda: later.responses == 1)
    assert sorted(ended) == list(range(7))
    assert [stream.responses for stream in streams] == [1] * 6
    assert caplog.text.count("the end of a call at its deadline failed") == 3


async def test_a_call_is_ended_at_its_deadline_once():
    clock = asyncio.get_running_loop().time
    app: Any = SimpleNamespace(message_bytes=1 << 20, clock=clock, deadlines=Deadlines(clock), tracer=None, access=None)
    ended: list[FastCall] = []

    def handle(body: bytes, call: FastCall) -> None:
        call.on_end = lambda: ended.append(call)

    stream: Any = Stream()
    call = FastCall(app, handle, stream)
    call.data(bytes(5), 5, is_end=True)
    call.deadline = math.nextafter(0.0, -1.0)
    for _ in range(3):
        call.expire()
    call.disconnected()
    assert (stream.responses, ended) == (1, [call])
