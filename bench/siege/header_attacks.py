"""Attacks with headers: long, many, distinct, never ending."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import hpack

from bench.siege.attack import ATTACKER, Attack
from bench.siege.messages import named, tensor
from bench.siege.wire import INFER, Connection, Script, dataframes, framed, head, headers
from mesh.h2 import frames
from mesh.h2.headers import encode

SMALL = framed(tensor("echo", "FP32", [1, 4], bytes(16)))
STATISTICS = b"/inference.GRPCInferenceService/ModelStatistics"


def _text(size: int) -> bytes:
    """Return text that no earlier call had, in characters with codes of 5 to 8 bits."""
    return os.urandom(size // 2 + 1).hex().encode()[:size]


def _huffman(size: int) -> bytes:
    """Encode a header with a distinct value of `size` bytes, Huffman-coded and not indexed."""
    encoder = hpack.Encoder()
    return bytes(encoder.encode([hpack.NeverIndexedHeaderTuple(b"x-long", _text(size))], huffman=True))


def _varied(connection: Connection, blocks: Iterator[bytes], body: bytes = SMALL, in_flight: int = 64) -> Script:
    """Call with a block of headers after the other."""
    while True:
        yield from connection.fewer(in_flight)
        connection.tally["calls"] += 1
        yield from connection.call(next(blocks), body)


@functools.cache
def _long_values() -> Sequence[bytes]:
    # Encoding costs more than decoding: a few values take turns.
    return [_huffman(55_000) for _ in range(8)]


def _long(connection: Connection) -> Script:
    values = _long_values()
    base = head(tenant=ATTACKER)
    yield from _varied(connection, (base + value for value in itertools.cycle(values)), in_flight=8)


def _long_each(connection: Connection) -> Script:
    base, values = head(tenant=ATTACKER), _long_values()
    yield from _varied(connection, (base + value for value in itertools.cycle(values)), in_flight=1)


def _distinct(size: int) -> Callable[[Connection], Script]:
    def script(connection: Connection) -> Script:
        blocks = (head(INFER, (b"x-new", _text(size)), tenant=ATTACKER) for _ in itertools.count())
        yield from _varied(connection, blocks)

    return script


def _many(connection: Connection) -> Script:
    fields = [(b"x-%d" % n, _text(200)) for n in range(240)]
    yield from _varied(connection, itertools.repeat(head(INFER, *fields, tenant=ATTACKER)), in_flight=16)


def _tenants(connection: Connection) -> Script:
    blocks = (head(INFER, tenant=_text(200).decode()) for _ in itertools.count())
    yield from _varied(connection, blocks, framed(tensor("slow", "FP32", [1, 4], bytes(16))), 200)


def _paths(connection: Connection) -> Script:
    yield from _varied(connection, (head(b"/" + _text(200), tenant=ATTACKER) for _ in itertools.count()))


def _names(connection: Connection) -> Script:
    block = head(tenant=ATTACKER)
    while True:
        yield from connection.fewer(64)
        connection.tally["calls"] += 1
        yield from connection.call(block, framed(named(_text(1000).decode(), b"")))


def _trailers(connection: Connection) -> Script:
    block = head(tenant=ATTACKER)
    trailers = encode([(b"x-%d" % n, _text(200)) for n in range(240)])
    while True:
        yield from connection.fewer(16)
        connection.tally["calls"] += 1
        number, opening = connection.open(block)
        yield opening + dataframes(number, SMALL) + headers(number, trailers, frames.END_STREAM)


def _continuations(connection: Connection) -> Script:
    number, _ = connection.open(b"")
    yield frames.frame(frames.HEADERS, 0, number, head(tenant=ATTACKER))
    flood = frames.frame(frames.CONTINUATION, 0, number) * 5000
    while True:
        connection.tally["frames"] += 5000
        yield flood


def _table_updates(connection: Connection) -> Script:
    # One byte each, and no field.
    while True:
        number, opening = connection.open(b"\x20" * 120_000)
        connection.forget(number)
        connection.tally["calls"] += 1
        yield opening


def _indexed(connection: Connection) -> Script:
    """Call with 240 fields of one byte each, of the static table, in an order that no earlier call had."""
    base = head(tenant=ATTACKER)
    # Entries 16 to 61 of the table are no pseudo-headers.
    blocks = (base + bytes(0x80 | 16 + byte % 46 for byte in os.urandom(240)) for _ in itertools.count())
    yield from _varied(connection, blocks)


def _slow_pages(connection: Connection) -> Script:
    paths = (
        STATISTICS,
        b"/inference.GRPCInferenceService/RepositoryIndex",
        b"/inference.GRPCInferenceService/ServerReady",
    )
    yield from _varied(connection, itertools.cycle(head(path, tenant=ATTACKER) for path in paths), framed(b""))


ATTACKS = (
    Attack("headers-55k", "calls with a header of 55 kB, Huffman-coded", _long, prepare=_long_values),
    Attack("headers-many", "calls with 240 headers of 200 bytes", _many),
    Attack("hpack-fill-900", "calls with distinct headers of 900 bytes", _distinct(900)),
    Attack("hpack-fill-15k", "calls with distinct headers of 15 kB", _distinct(15_000)),
    Attack("hpack-fill-50k", "calls with distinct headers of 50 kB", _distinct(50_000)),
    Attack("tenants", "calls of as many tenants as calls", _tenants),
    Attack("paths", "calls of methods that do not exist, with distinct names", _paths),
    Attack("names", "calls of models that do not exist, with distinct names", _names),
    Attack("trailers", "trailers of 50 kB after each request", _trailers),
    Attack("continuation", "CONTINUATION frames without an end", _continuations, is_raw=True),
    Attack("table-updates", "header blocks of 120,000 table size updates", _table_updates),
    Attack("indexed-fields", "calls with 240 headers of one byte each, in distinct orders", _indexed),
    Attack(
        "headers-55k-500",
        "one call with a header of 55 kB at a time on 500 connections",
        _long_each,
        prepare=_long_values,
        connections=500,
    ),
    Attack("administration", "ModelStatistics, RepositoryIndex and ServerReady", _slow_pages),
)
