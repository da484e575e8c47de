"""Bystander: calls at a steady rate, whether or not earlier calls are answered. Runs in a process of its own.

    python -m bench.siege.bystander ADDRESS TENANT CALLS_A_SECOND [live|health|jobs]

`live` and `health` probe infer and other services. A call of `jobs` submits a job, and then waits for its result.
Prints "ready", reads {"start": s, "end": s} (time.monotonic) from its standard input, and prints each call: when it was
due, how long it took from then (None without a response), and how it ended. As clients of gRPC do, it opens another
connection after a GOAWAY or the end of its connection, and repeats calls that the server says it has not begun.
"""

from __future__ import annotations

import functools
import json
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.siege.wire import (
    HEALTH,
    INFER,
    LIVE,
    PREFIX_BYTES,
    RESULT,
    SUBMIT,
    Connection,
    dataframes,
    framed,
    head,
    pin_to_client_core,
)
from mesh.h2 import frames
from shoal.errors import Code
from shoal.inference.v2 import inference_pb2 as pb
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2

OK = "status 0"
PATIENCE_S = 30.0
"""Time that calls without a response are waited for at the end."""

# Longest wait of one GetResult, and its status when there is no result yet.
_WAIT_S = 5
_NOT_YET = f"status {int(Code.NOT_FOUND)}"

Call = tuple[float, float | None, str]
"""Time when it was due, seconds until its response, outcome."""


def question() -> tuple[pb.ModelInferRequest, bytes]:
    """Return a request for the model `small`, and the bytes of the right answer."""
    row = np.array([1, 2, 3, 4], np.float32)
    request = pb.ModelInferRequest(model_name="small")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(row.tobytes())
    return request, (2 * row).tobytes()


class Bystander:
    """Calls of one bystander."""

    def __init__(self, address: str, tenant: str, *, probed: bytes = b"") -> None:
        """Call the model, or the RPC `probed`, whose answer is true."""
        self._address = address
        self._head = head(probed or INFER, tenant=tenant)
        request, self._answer = question()
        self._body = framed(b"" if probed else request.SerializeToString())
        if probed:
            self._answer = b"\x08\x01"
        self._connections: list[Connection] = []
        self._due: dict[tuple[Connection, int], float] = {}
        self.calls: list[Call] = []
        self.repeated = 0

    def run(self, start: float, end: float, rate: float) -> Sequence[Call]:
        """Call from `start` to `end`, and wait for the responses."""
        total = int((end - start) * rate)
        made = 0
        while made < total or (self._due and time.monotonic() < end + PATIENCE_S):
            while made < total and time.monotonic() >= start + made / rate:
                self._call(start + made / rate)
                made += 1
            self._turn(max(0.0, start + made / rate - time.monotonic()) if made < total else 0.05)
        self.calls += [(due, None, "no response") for due in self._due.values()]
        return self.calls

    def _call(self, due: float) -> None:
        if not self._connections or not self._connections[-1].is_open or self._connections[-1].goaway is not None:
            self._connect()
        connection = self._connections[-1]
        block, body = self._request(due)
        number, opening = connection.open(block)
        self._due[connection, number] = due
        connection.send(opening + dataframes(number, body, frames.END_STREAM))

    def _request(self, due: float) -> tuple[bytes, bytes]:
        """Return the headers and the body of the call."""
        return self._head, self._body

    def _ended(self, due: float, outcome: str, body: bytes) -> None:
        is_wrong = outcome == OK and self._answer not in body
        self.calls.append((due, time.monotonic() - due, "wrong answer" if is_wrong else outcome))

    def _connect(self) -> None:
        connection: Connection

        def on_end(number: int, outcome: str, body: bytes) -> None:
            due = self._due.pop((connection, number))
            if outcome == "reset REFUSED_STREAM":
                self._repeat(due)
                return
            self._ended(due, outcome, body)

        connection = Connection(self._address, Counter(), on_end=on_end)
        self._connections.append(connection)

    def _repeat(self, due: float) -> None:
        self.repeated += 1
        self._call(due)

    def _turn(self, wait_s: float) -> None:
        poll = select.poll()
        by_number = {}
        for connection in self._connections:
            by_number[connection.socket.fileno()] = connection
            poll.register(connection.socket, select.POLLIN | (select.POLLOUT if connection.has_output else 0))
        for number, events in poll.poll(wait_s * 1000):
            connection = by_number[number]
            if events & ~select.POLLOUT:
                connection.read()
            if connection.is_open:
                connection.write()
        for connection in self._connections:
            self._settle(connection)
        self._connections = [one for one in self._connections if one.is_open]

    def _settle(self, connection: Connection) -> None:
        """Repeat the calls that the server has not begun, and end those of a closed connection."""
        if connection.goaway is None and connection.is_open:
            return
        last = connection.goaway
        for number in sorted(connection.streams):
            if last is not None and number > last:
                connection.forget(number)
                self._repeat(self._due.pop((connection, number)))
            elif not connection.is_open:
                connection.forget(number)
                due = self._due.pop((connection, number))
                self.calls.append((due, time.monotonic() - due, "connection lost"))
        if connection.is_open and not connection.streams:
            connection.close()


class JobBystander(Bystander):
    """Bystander whose calls are jobs: each is submitted, and then its result is waited for."""

    def __init__(self, address: str, tenant: str) -> None:
        super().__init__(address, tenant)
        request, self._answer = question()
        self._submit = (
            head(SUBMIT, tenant=tenant),
            framed(ingest_pb2.SubmitRequest(request=request).SerializeToString()),
        )
        self._get = head(RESULT, tenant=tenant)
        # The ids of the submitted jobs, by the time when they were due.
        self._jobs: dict[float, str] = {}

    def _request(self, due: float) -> tuple[bytes, bytes]:
        if due not in self._jobs:
            return self._submit
        get = store_pb2.GetResultRequest(job_id=self._jobs[due])
        get.wait.FromSeconds(_WAIT_S)
        return self._get, framed(get.SerializeToString())

    def _ended(self, due: float, outcome: str, body: bytes) -> None:
        if outcome == OK and due not in self._jobs:
            self._jobs[due] = ingest_pb2.SubmitResponse.FromString(body[PREFIX_BYTES:]).job.id
            self._call(due)
        elif outcome.startswith(_NOT_YET) and time.monotonic() < due + PATIENCE_S:
            self._call(due)
        else:
            super()._ended(due, outcome, body)


_KINDS: dict[str, Callable[[str, str], Bystander]] = {
    "infer": Bystander,
    "live": functools.partial(Bystander, probed=LIVE),
    "health": functools.partial(Bystander, probed=HEALTH),
    "jobs": JobBystander,
}


def main() -> None:
    address, tenant, rate, *kind = sys.argv[1:]
    bystander = _KINDS[kind[0] if kind else "infer"](address, tenant)
    pin_to_client_core(has_precedence=True)
    print("ready", flush=True)
    times: dict[str, Any] = json.loads(sys.stdin.readline())
    calls = bystander.run(times["start"], times["end"], float(rate))
    json.dump({"calls": calls, "repeated": bystander.repeated}, sys.stdout)


if __name__ == "__main__":
    main()
