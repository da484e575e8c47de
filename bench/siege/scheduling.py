"""Attacks on the scheduler: costs that vary, full queues, cancellations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from bench.siege.attack import ATTACKER, Attack
from bench.siege.messages import tensor
from bench.siege.wire import INFER, Connection, Script, dataframes, framed, head
from mesh.h2 import frames
from mesh.h2.frames import Reason


def _shapes(connection: Connection) -> Script:
    """60 short calls, whose cost is learned, then a long one."""
    block = head(tenant=ATTACKER)
    short, long = (framed(tensor("attention", "FP32", [1, t, 64], bytes(256 * t))) for t in (8, 3000))
    while True:
        for body in (*(short,) * 60, long):
            yield from connection.fewer(1)
            connection.tally["calls"] += 1
            yield from connection.call(block, body)


def _full_queue(connection: Connection) -> Script:
    blocks = itertools.cycle([head(tenant=ATTACKER), head(tenant="other")])
    body = framed(tensor("slow", "FP32", [1, 4], bytes(16)))
    while True:
        yield from connection.fewer(3000)
        connection.tally["calls"] += 1
        yield from connection.call(next(blocks), body)


def _cancelled(model: str, rows: int, timeouts: bool) -> Callable[[Connection], Script]:
    """Call, with deadlines or cancellations at any moment."""

    def script(connection: Connection) -> Script:
        draw = random.Random(rows)
        body = framed(tensor(model, "FP32", [rows, 4], bytes(16 * rows)))
        plain = head(tenant=ATTACKER)
        live: list[int] = []
        while True:
            yield from connection.fewer(50)
            timeout = (b"grpc-timeout", b"%dm" % draw.randrange(1, 200))
            block = head(INFER, timeout, tenant=ATTACKER) if timeouts and draw.random() < 0.5 else plain
            number, opening = connection.open(block)
            connection.tally["calls"] += 1
            live.append(number)
            yield opening + dataframes(number, body, frames.END_STREAM)
            if draw.random() < 0.3 and (victim := live.pop(draw.randrange(len(live)))) in connection.streams:
                connection.forget(victim)
                connection.tally["cancelled"] += 1
                yield frames.rst_stream(victim, Reason.CANCEL)
            live = [each for each in live if each in connection.streams]

    return script


ATTACKS = (
    Attack("shapes", "60 short calls of a model, then one of 3,000 tokens, again and again", _shapes),
    Attack("full-queue", "a slow model's queue, full, with two tenants", _full_queue),
    Attack(
        "cancel-rows", "cancelled calls of an ensemble with `each` and preserve_ordering", _cancelled("rows", 24, False)
    ),
    Attack("expire-rows", "the same, with deadlines too", _cancelled("rows", 24, True)),
    Attack("cancel-ordered", "cancelled and expired calls with preserve_ordering", _cancelled("ordered", 1, True)),
    Attack("cancel-slow", "cancelled and expired calls of a slow model", _cancelled("slow", 1, True)),
)
