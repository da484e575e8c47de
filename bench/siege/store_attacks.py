"""Attacks on store through the gateway of a node: streams, exports and searches of results, pushes of models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from bench.siege.attack import ATTACKER
from bench.siege.job_attacks import calling, cancelling, of_jobs, results, watching
from bench.siege.messages import MIB
from bench.siege.wire import Connection, Script, framed, head
from mesh.h2 import frames
from mesh.h2.frames import Reason
from shoal.store.v1 import store_pb2

pb: Any = store_pb2
STORE = b"/shoal.store.v1.StoreService/"
# Time between two readings of a slow reader.
_PAUSE_S = 0.2


def _streams(accept: bytes, *, is_read: bool) -> Callable[[Connection], Script]:
    """Return a script that streams all results, and reads them now and then, or not at all."""
    request = b"GET /shoal/v1/results:stream HTTP/1.1\r\nHost: localhost\r\naccept: %b\r\nx-shoal-tenant: %b\r\n\r\n"

    def script(connection: Connection) -> Script:
        connection.is_reading = False
        connection.tally["calls"] += 1
        yield request % (accept, ATTACKER.encode())
        yield from connection.read_now_and_then(_PAUSE_S if is_read else None)

    return script


def _nothing() -> bytes:
    """Return a search that examines all results of the tenant, and matches none."""
    made = pb.QueryResultsRequest(tenant=ATTACKER, model_name="small", page_size=1000)
    made.labels["n"] = "none"
    return bytes(made.SerializeToString())


def _page() -> bytes:
    return bytes(pb.QueryResultsRequest(tenant=ATTACKER, page_size=1000).SerializeToString())


def _cut_pushes(connection: Connection) -> Script:
    """Begin uploads of 64 MiB, send 4 MiB of each, and reset every other one. The rest is left open."""
    block, chunk = (
        head(STORE + b"PutArtifact", tenant=ATTACKER),
        framed(pb.PutArtifactRequest(chunk=bytes(MIB)).SerializeToString()),
    )
    while True:
        yield from connection.fewer(16)
        made = pb.PutArtifactRequest()
        made.header.sha256, made.header.size_bytes = hashlib.sha256(os.urandom(16)).hexdigest(), 64 * MIB
        number, opening = connection.open(block)
        connection.tally["calls"] += 1
        yield opening
        yield from connection.body(number, framed(made.SerializeToString()), is_end=False)
        for _ in range(4):
            yield from connection.body(number, chunk, is_end=False)
        if connection.tally["calls"] % 2 and number in connection.streams:
            connection.forget(number)
            connection.tally["resets"] += 1
            yield frames.rst_stream(number, Reason.CANCEL)


def _empty() -> list[bytes]:
    return [b""]


_EXPORT, _QUERY = STORE + b"ExportResults", STORE + b"QueryResults"
ATTACKS = (
    of_jobs(
        "results-unread",
        "200 streams of results as NDJSON, no reading",
        _streams(b"application/x-ndjson", is_read=False),
        connections=200,
        stock=results,
        is_plain=True,
    ),
    of_jobs(
        "results-slow",
        "200 streams of results as SSE, slow reading",
        _streams(b"text/event-stream", is_read=True),
        connections=200,
        stock=results,
        is_plain=True,
    ),
    of_jobs(
        "exports-unread",
        "exports of all results, no reading",
        watching(_EXPORT, _empty, 16, is_read=False),
        settings={frames.WINDOW_SIZE: 1024},
        stock=results,
    ),
    of_jobs(
        "exports-reset", "exports that are reset after their first data", cancelling(_EXPORT, bytes), stock=results
    ),
    of_jobs("search-nothing", "searches that match nothing", calling(_QUERY, _nothing), stock=results),
    of_jobs("search-reset", "such searches, cancelled and repeated", cancelling(_QUERY, _nothing), stock=results),
    of_jobs("list-results", "pages of 1,000 results", calling(_QUERY, _page), stock=results),
    of_jobs("cut-pushes", "uploads of 64 MiB that are cut after 4 MiB, or wait there", _cut_pushes),
)
