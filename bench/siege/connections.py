"""Attacks with connections and streams that do nothing."""

from __future__ import annotations

from bench.siege.attack import ATTACKER, Attack
from bench.siege.memory import STREAM
from bench.siege.wire import LIVE, Connection, Script, dataframes, framed, head
from mesh.h2 import frames


def _idle_streams(connection: Connection) -> Script:
    block = head(STREAM, tenant=ATTACKER)
    for _ in range(min(connection.max_streams, 1250)):
        connection.tally["streams"] += 1
        yield connection.open(block)[1]


def _too_many_streams(connection: Connection) -> Script:
    """Open streams beyond the server's limit, and ignore its resets."""
    block = head(STREAM, tenant=ATTACKER)
    while True:
        connection.tally["streams"] += 100
        yield b"".join(connection.open(block)[1] for _ in range(100))


def _greeting(connection: Connection) -> Script:
    connection.tally["greetings"] += 1
    return
    yield


def _one_call(connection: Connection) -> Script:
    connection.tally["calls"] += 1
    number, opening = connection.open(head(LIVE, tenant=ATTACKER))
    yield opening + dataframes(number, framed(b""), frames.END_STREAM)
    yield from connection.fewer(1)


ATTACKS = (
    Attack("idle-streams", "10,000 streams without a message", _idle_streams),
    Attack("too-many-streams", "streams beyond the limit", _too_many_streams),
    Attack("idle-connections", "3,000 connections without a call", _greeting, connections=3000),
    Attack("churn", "connections that close at once", _greeting, connections=64, is_brief=True),
    Attack("churn-calls", "connections that close after one call", _one_call, connections=64, is_brief=True),
)
