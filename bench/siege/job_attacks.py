"""Attacks on ingest through the gateway of a node: submits, watches, batches, lists, schedules, JSON."""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import shoal
from bench.siege.attack import ATTACKER, Attack
from bench.siege.messages import MIB, tensor
from bench.siege.wire import Connection, Script, dataframes, framed, head
from mesh.h2 import frames
from mesh.h2.frames import Reason
from shoal.client import BatchState, JobRequest
from shoal.ingest.v1 import ingest_pb2

pb: Any = ingest_pb2
INGEST = b"/shoal.ingest.v1.IngestService/"
STOCK = 2_000
"""Jobs of the attacker that wait, and results that it has."""
BATCHES = 300
BATCHES_FOLDER = Path(tempfile.gettempdir()) / f"shoal-siege-batches-{os.getuid()}"
"""The input of batches and what they write, for all attacks of a siege."""
_ROWS = 200


def calling(rpc: bytes, body: Callable[[], bytes], *, in_flight: int = 32) -> Callable[[Connection], Script]:
    """Return a script that keeps so many calls in flight, each with a body of its own."""

    def script(connection: Connection) -> Script:
        block = head(rpc, tenant=ATTACKER)
        while True:
            yield from connection.fewer(in_flight)
            connection.tally["calls"] += 1
            yield from connection.call(block, framed(body()))

    return script


def watching(
    rpc: bytes, bodies: Callable[[], list[bytes]], count: int, *, is_read: bool
) -> Callable[[Connection], Script]:
    """Return a script that opens `count` streams, over all bodies in turn, and opens those that end again."""

    def script(connection: Connection) -> Script:
        block, each = head(rpc, tenant=ATTACKER), itertools.cycle(bodies())
        while True:
            yield from connection.fewer(count)
            number, opening = connection.open(block)
            connection.tally["streams"] += 1
            yield opening + dataframes(number, framed(next(each)), frames.END_STREAM)
            connection.is_reading = is_read or len(connection.streams) < 10

    return script


def cancelling(rpc: bytes, body: Callable[[], bytes], *, at_once: int = 10) -> Callable[[Connection], Script]:
    """Return a script that calls, and resets the calls when the next data has come or 10 ms have passed."""

    def script(connection: Connection) -> Script:
        block = head(rpc, tenant=ATTACKER)
        while True:
            opened = []
            for _ in range(at_once):
                number, opening = connection.open(block)
                opened.append(number)
                yield opening + dataframes(number, framed(body()), frames.END_STREAM)
            yield None
            yield None
            left = [number for number in opened if number in connection.streams]
            for number in left:
                connection.forget(number)
            connection.tally["resets"] += len(left)
            yield b"".join(frames.rst_stream(number, Reason.CANCEL) for number in left)

    return script


def submission(raw: bytes = bytes(16), **more: object) -> Any:
    """Return a SubmitRequest for the model `small`."""
    made = pb.SubmitRequest(**more)
    made.request.ParseFromString(tensor("small", "FP32", [len(raw) // 16, 4], raw))
    return made


@contextlib.contextmanager
def client(address: str) -> Iterator[Any]:
    """Yield a client of the attacker's tenant."""
    with shoal.Client(address, tenant=ATTACKER) as opened:
        yield opened


# -- what the attacks need in the node

_ids: dict[str, list[str]] = {}


def waiting_jobs(address: str) -> None:
    """Submit jobs that do not run for an hour: once in the life of a node."""
    with client(address) as node:
        _ids["jobs"] = [each.job_id for each in node.jobs.submit_many(_jobs("waits", delay=3600))]


def results(address: str) -> None:
    """Submit jobs, and wait until they have run: once in the life of a node."""
    with client(address) as node:
        for _ in node.jobs.run_many(_jobs("runs", labels={"from": "siege"})):
            pass


def _jobs(key: str, **more: Any) -> list[JobRequest]:
    rows = {"x": np.zeros((1, 4), np.float32)}
    return [JobRequest("small", rows, idempotency_key=f"siege-{key}-{n}", **more) for n in range(STOCK)]


def _batches(address: str) -> None:
    """Submit batches, which cannot end soon: many chunks of few rows."""
    BATCHES_FOLDER.mkdir(exist_ok=True)
    source = BATCHES_FOLDER / "in.jsonl"
    # A batch fails when its input changes.
    if not source.exists():
        source.write_text('{"x": [1, 2, 3, 4]}\n' * _ROWS)
    _ids["source"] = [source.as_uri()]


def _output() -> str:
    return (BATCHES_FOLDER / uuid.uuid4().hex).as_uri()


def _batch() -> bytes:
    return bytes(
        pb.SubmitBatchRequest(
            inputs=_ids["source"], output=_output(), model_name="small", tenant=ATTACKER, chunk_rows=1
        ).SerializeToString()
    )


def _submit_batches(connection: Connection) -> Script:
    """Submit batches, list them, watch them and cancel them: all at the same time."""
    block = head(INGEST + b"SubmitBatch", tenant=ATTACKER)
    for _ in range(BATCHES):
        yield from connection.fewer(16)
        connection.tally["batches"] += 1
        connection.tally["calls"] += 1
        yield from connection.call(block, framed(_batch()))
    lists = head(INGEST + b"ListBatches", tenant=ATTACKER)
    while True:
        yield from connection.fewer(16)
        connection.tally["calls"] += 1
        yield from connection.call(lists, framed(pb.ListBatchesRequest(page_size=1000).SerializeToString()))


def _running_batches(address: str) -> None:
    _batches(address)
    with client(address) as node:
        known = [each.id for each in node.batches.list(state=BatchState.RUNNING)]
        while len(known) < 100:
            made = node.batches.submit("small", _ids["source"], _output(), chunk_rows=1)
            known.append(made.id)
        _ids["batches"] = known


def _job_json() -> bytes:
    """Return a SubmitRequest as JSON, with as many values as a JSON call may have."""
    values = [0.5] * 98_000
    inputs = [{"name": "x", "datatype": "FP32", "shape": [len(values) // 4, 4], "contents": {"fp32_contents": values}}]
    return json.dumps({"request": {"model_name": "small", "inputs": inputs}}, separators=(",", ":")).encode()


def _raw_json() -> bytes:
    """Return a SubmitRequest as JSON of nearly 1 MiB, with few values."""
    raw = bytes(760_000)
    inputs = [{"name": "x", "datatype": "FP32", "shape": [len(raw) // 16, 4]}]
    request = {"model_name": "small", "inputs": inputs, "raw_input_contents": [base64.b64encode(raw).decode()]}
    return json.dumps({"request": request}).encode()


def _posts(body: Callable[[], bytes]) -> Callable[[Connection], Script]:
    made = functools.cache(body)

    def script(connection: Connection) -> Script:
        data = made()
        opening = b"POST /shoal/v1/jobs HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\n"
        opening += b"x-shoal-tenant: %b\r\nContent-Length: %d\r\n\r\n" % (ATTACKER.encode(), len(data))
        while True:
            sent = connection.responses
            connection.tally["calls"] += 1
            yield opening + data
            while connection.responses == sent:
                yield None

    return script


@functools.cache
def _largest() -> bytes:
    return bytes(submission(bytes(12 * MIB - 1024)).SerializeToString())


@functools.cache
def _smallest() -> bytes:
    return bytes(submission().SerializeToString())


def _schedule() -> bytes:
    made = pb.PutScheduleRequest()
    made.schedule.name, made.schedule.tenant, made.schedule.cron = uuid.uuid4().hex, ATTACKER, "* * * * *"
    made.schedule.job.CopyFrom(submission(bytes(16 * 1024)))
    return bytes(made.SerializeToString())


def _schedules(connection: Connection) -> Script:
    """Create schedules that are due each minute, and list all of them."""
    puts, lists = head(INGEST + b"PutSchedule", tenant=ATTACKER), head(INGEST + b"ListSchedules", tenant=ATTACKER)
    for at in itertools.count():
        yield from connection.fewer(32)
        connection.tally["calls"] += 1
        yield from connection.call(*((lists, framed(b"")) if at % 20 == 19 else (puts, framed(_schedule()))))


def _page() -> bytes:
    return bytes(pb.ListJobsRequest(tenant=ATTACKER, page_size=1000).SerializeToString())


def _watched(kind: str, message: Any) -> Callable[[], list[bytes]]:
    return lambda: [bytes(message(id=each).SerializeToString()) for each in _ids[kind]]


def _cancels(connection: Connection) -> Script:
    block = head(INGEST + b"CancelBatch", tenant=ATTACKER)
    for body in itertools.cycle(_watched("batches", pb.CancelBatchRequest)()):
        yield from connection.fewer(500)
        connection.tally["calls"] += 1
        yield from connection.call(block, framed(body))


_SUBMIT = INGEST + b"Submit"
of_jobs = functools.partial(Attack, is_of_jobs=True)
ATTACKS = (
    of_jobs("submit-large", "jobs of 12 MiB", calling(_SUBMIT, _largest, in_flight=8), scripts=8),
    of_jobs("submit-small", "the smallest jobs at full rate", calling(_SUBMIT, _smallest, in_flight=256)),
    of_jobs("list-jobs", "lists of jobs, 1,000 a page", calling(INGEST + b"ListJobs", _page), stock=waiting_jobs),
    of_jobs(
        "list-jobs-unread",
        "lists of jobs, 1,000 a page, that nobody reads",
        watching(INGEST + b"ListJobs", lambda: [_page()], 1000, is_read=False),
        stock=waiting_jobs,
    ),
    of_jobs(
        "watch-jobs",
        "8,000 watches of 2,000 jobs",
        watching(INGEST + b"WatchJob", _watched("jobs", pb.WatchJobRequest), 1000, is_read=True),
        stock=waiting_jobs,
    ),
    of_jobs(
        "watch-jobs-reset",
        "watches of jobs that are reset at once",
        cancelling(
            INGEST + b"WatchJob", lambda: bytes(pb.WatchJobRequest(id=_ids["jobs"][0]).SerializeToString()), at_once=50
        ),
        stock=waiting_jobs,
    ),
    of_jobs(
        "batches",
        "300 batches of one tenant on each of 2 connections, and lists of all",
        _submit_batches,
        connections=2,
        stock=_batches,
    ),
    of_jobs(
        "watch-batches",
        "8,000 watches of 100 batches",
        watching(INGEST + b"WatchBatch", _watched("batches", pb.WatchBatchRequest), 1000, is_read=True),
        stock=_running_batches,
    ),
    of_jobs("cancel-batches", "4,000 cancellations of 100 batches at a time", _cancels, stock=_running_batches),
    of_jobs("schedules", "schedules that are due each minute, and lists of them", _schedules),
    of_jobs("json-values", "jobs as JSON with as many values as are accepted", _posts(_job_json), is_plain=True),
    of_jobs("json-raw", "jobs as JSON of nearly 1 MiB", _posts(_raw_json), is_plain=True),
)
