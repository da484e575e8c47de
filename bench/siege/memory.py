"""Attacks on memory: half bodies, unread responses, large messages, slow senders."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from bench.siege.attack import ATTACKER, Attack
from bench.siege.messages import MIB, repeating, tensor
from bench.siege.wire import Connection, Script, framed, head
from mesh.h2 import frames

STREAM = b"/inference.GRPCInferenceService/ModelStreamInfer"

# Time between two readings of a slow reader.
_PAUSE_S = 0.5


@functools.cache
def echo(nbytes: int) -> bytes:
    """Return a request whose response has as many bytes."""
    return framed(tensor("echo", "FP32", [1, nbytes // 4], bytes(nbytes)))


def _half_bodies(connection: Connection) -> Script:
    block, half = head(tenant=ATTACKER), echo(4 * MIB)[: 3 * MIB]
    for _ in range(200):
        yield from connection.fewer(1000)
        number, opening = connection.open(block)
        connection.tally["calls"] += 1
        yield opening
        yield from connection.body(number, half, is_end=False, is_patient=False)


def _tiny_pieces(connection: Connection) -> Script:
    # Each frame has one byte.
    block = head(tenant=ATTACKER)
    while True:
        yield from connection.fewer(100)
        number, opening = connection.open(block)
        connection.tally["calls"] += 1
        piece = frames.frame(frames.DATA, 0, number, b"\x00") * 1000
        yield opening
        for _ in range(50):
            if number not in connection.streams or not connection.take(number, 1000):
                break
            yield piece


def _unread(nbytes: int) -> Callable[[Connection], Script]:
    def script(connection: Connection) -> Script:
        connection.is_reading = False
        block, body = head(tenant=ATTACKER), echo(nbytes)
        for _ in range(min(connection.max_streams, 4000)):
            connection.tally["calls"] += 1
            yield from connection.call(block, body)

    return script


def _unread_streams(connection: Connection) -> Script:
    connection.is_reading = False
    block, body = head(STREAM, tenant=ATTACKER), echo(MIB)
    numbers = []
    for _ in range(16):
        number, opening = connection.open(block)
        numbers.append(number)
        yield opening
    for _ in range(1000):
        for number in numbers:
            connection.tally["messages"] += 1
            yield from connection.body(number, body, is_end=False, is_patient=False)


def _idle_after_large(connection: Connection) -> Script:
    """Open streams that stay open after their first response."""
    block, body = head(STREAM, tenant=ATTACKER), echo(4 * MIB)
    for _ in range(min(connection.max_streams, 1000)):
        number, opening = connection.open(block)
        connection.tally["streams"] += 1
        yield opening
        yield from connection.body(number, body, is_end=False)


def _many(*, is_read: bool) -> Callable[[Connection], Script]:
    """Return a script that opens one stream, whose responses do not end. It reads them now and then, or not at all."""

    def script(connection: Connection) -> Script:
        connection.is_reading = False
        number, opening = connection.open(head(STREAM, tenant=ATTACKER))
        connection.tally["calls"] += 1
        yield opening
        yield from connection.body(number, framed(tensor("many", "FP32", [1], bytes(4))), is_end=False)
        yield from connection.read_now_and_then(_PAUSE_S if is_read else None)

    return script


def _no_window(connection: Connection) -> Script:
    block, body = head(tenant=ATTACKER), echo(MIB)
    for _ in range(min(connection.max_streams, 1000)):
        connection.tally["calls"] += 1
        yield from connection.call(block, body)


def _large(connection: Connection) -> Script:
    block, body = head(tenant=ATTACKER), echo(100_000_000)
    while True:
        yield from connection.fewer(2)
        connection.tally["calls"] += 1
        yield from connection.call(block, body)


def _slow(connection: Connection) -> Script:
    """Send a byte of each of many bodies twice a second."""
    block, body = head(tenant=ATTACKER), echo(MIB)
    opened = []
    for _ in range(min(connection.max_streams, 500)):
        number, opening = connection.open(block)
        opened.append(number)
        connection.tally["calls"] += 1
        yield opening
    at, due = 0, 0.0
    while True:
        while time.monotonic() < due:
            yield None
        due, at = time.monotonic() + 0.5, at + 1
        for number in opened:
            yield from connection.body(number, body[at : at + 1], is_end=False, is_patient=False)


ATTACKS = (
    Attack("half-bodies", "bodies of 4 MiB, of which 3 MiB are sent", _half_bodies),
    Attack("tiny-pieces", "bodies in frames of one byte, never whole", _tiny_pieces),
    Attack("unread", "responses of 1 MiB, no reading", _unread(MIB)),
    Attack("unread-small", "responses of 4 KiB, no reading", _unread(4096)),
    Attack("unread-streams", "streams of responses of 1 MiB, no reading", _unread_streams),
    Attack("idle-after-large", "streams that stay open after a response of 4 MiB", _idle_after_large),
    Attack("many-unread", "240 streams of a decoupled model, no reading", _many(is_read=False), connections=240),
    Attack("many-slow", "240 streams of a decoupled model, slow reading", _many(is_read=True), connections=240),
    Attack("no-window", "responses of 1 MiB, and no window", _no_window, settings={frames.WINDOW_SIZE: 0}),
    Attack("large", "messages of 100 MB, and responses of 100 MB", _large, prepare=lambda: echo(100_000_000)),
    repeating(
        "wide-outputs",
        "requests of 4 bytes, responses of 50 MB",
        lambda: framed(tensor("wide", "FP32", [1, 1], bytes(4))),
    ),
    Attack("slow-senders", "4,000 bodies, a byte of each twice a second", _slow),
)
