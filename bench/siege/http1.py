"""Attacks over HTTP/1.1, and with the JSON of REST."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from bench.siege.attack import ATTACKER, Attack
from bench.siege.wire import Connection, Script

_TENANT = b"x-shoal-tenant: %b\r\n" % ATTACKER.encode()
_HEAD = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\n" + _TENANT
_LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n" + _TENANT + b"\r\n"


def _sized(body: bytes, *lines: bytes) -> bytes:
    return b"".join((_HEAD, *lines, b"Content-Length: %d\r\n\r\n" % len(body), body))


def _endless(what: str, data: Callable[[], bytes]) -> Callable[[Connection], Script]:
    def script(connection: Connection) -> Script:
        while True:
            connection.tally[what] += 1
            yield data()

    return script


def _one_by_one(data: Callable[[], bytes], count: int = 8) -> Callable[[Connection], Script]:
    """Send requests, and wait for their responses after each `count`."""

    def script(connection: Connection) -> Script:
        sent = 0
        while True:
            connection.tally["calls"] += 1
            sent += 1
            yield data()
            while sent - connection.responses >= count:
                yield None

    return script


def _trickle(opening: bytes) -> Callable[[Connection], Script]:
    """Send a byte each time that something may be sent."""

    def script(connection: Connection) -> Script:
        connection.tally["messages"] += 1
        yield opening
        while True:
            yield b"a"
            yield None

    return script


def _pipelining_unread(connection: Connection) -> Script:
    connection.is_reading = False
    while True:
        connection.tally["calls"] += 500
        yield _LIVE * 500


def _chunked(after_head: Callable[[], bytes]) -> Callable[[Connection], Script]:
    """Send chunked bodies, one after the other."""

    def script(connection: Connection) -> Script:
        while True:
            connection.tally["messages"] += 1
            yield _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + after_head()

    return script


def _unread(connection: Connection) -> Script:
    connection.is_reading = False
    while True:
        connection.tally["calls"] += 1
        yield _sized(_large())
        yield None


@functools.cache
def _large() -> bytes:
    values = b"1," * 99_999 + b"1"
    return b'{"inputs":[{"name":"x","shape":[25000,4],"datatype":"FP32","data":[' + values + b"]}]}"


@functools.cache
def _containers() -> bytes:
    return b'{"inputs":[' + b"[]," * 99_990 + b"1]}"


@functools.cache
def _numbers() -> bytes:
    return b'{"inputs":[' + b"0.12345678," * 599_990 + b"1]}"


@functools.cache
def _chunks() -> bytes:
    return b"1\r\n \r\n" * 10_000


def _tiny_chunks(connection: Connection) -> Script:
    while True:
        connection.tally["messages"] += 1
        yield _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        for _ in range(20):
            yield _chunks()
        yield b"0\r\n\r\n"


def _large_headers() -> bytes:
    return _sized(b"{}", b"X-New: " + os.urandom(30_000).hex().encode() + b"\r\n")


@functools.cache
def _many_headers() -> bytes:
    return _HEAD + b"X:\r\n" * 15_000 + b"\r\n"


def _smuggled() -> bytes:
    return _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _LIVE


def _once(data: Callable[[], bytes]) -> Callable[[Connection], Script]:
    def script(connection: Connection) -> Script:
        connection.tally["calls"] += 1
        yield data()
        while not connection.responses:
            yield None

    return script


ATTACKS = tuple(
    Attack(name, what, script, is_plain=True, connections=connections, is_brief=is_brief)
    for name, what, script, connections, is_brief in (
        (
            "h1-pipelining",
            "requests one after the other, whose responses nobody waits for",
            _endless("calls", lambda: _LIVE * 500),
            8,
            False,
        ),
        ("h1-slow-heads", "heads that arrive byte by byte", _trickle(b"GET /v2 HTTP/1.1\r\nX: "), 200, False),
        (
            "h1-slow-bodies",
            "bodies that arrive byte by byte",
            _trickle(_HEAD + b"Content-Length: 99999999\r\n\r\n"),
            200,
            False,
        ),
        (
            "h1-half-bodies",
            "bodies of 64 MiB whose end never comes",
            _trickle(_HEAD + b"Content-Length: 67108864\r\n\r\n" + bytes(4 << 20)),
            64,
            False,
        ),
        ("h1-tiny-chunks", "chunks of one byte", _tiny_chunks, 8, False),
        (
            "h1-extensions",
            "chunks of one byte with an extension",
            _chunked(lambda: b"1;a=bc\r\n \r\n" * 8_000 + b"0\r\n\r\n"),
            8,
            False,
        ),
        (
            "h1-trailers",
            "as many trailers as are accepted",
            _chunked(lambda: b"1\r\n \r\n0\r\n" + b"X:\r\n" * 15_000 + b"\r\n"),
            8,
            False,
        ),
        ("h1-many-headers", "heads of 15,000 lines, each on a new connection", _once(_many_headers), 64, True),
        ("h1-pipelining-unread", "requests whose small responses nobody reads", _pipelining_unread, 8, False),
        ("h1-headers", "distinct headers of 60 kB", _one_by_one(_large_headers), 8, False),
        ("h1-smuggling", "requests with two framings, each on a new connection", _once(_smuggled), 32, True),
        ("h1-unread", "large responses that nobody reads", _unread, 8, False),
        (
            "json-containers",
            "JSON with as many lists as are accepted",
            _one_by_one(lambda: _sized(_containers()), 1),
            8,
            False,
        ),
        (
            "json-numbers",
            "JSON with as many numbers as are accepted",
            _one_by_one(lambda: _sized(_numbers()), 1),
            8,
            False,
        ),
    )
)
