"""Bystander: calls at a steady rate, whether or not earlier calls are answered. Runs in a process of its own.

    python -m bench.siege.bystander ADDRESS TENANT CALLS_A_SECOND [live]

Prints "ready", reads {"start": s, "end": s} (time.monotonic) from its standard input, and prints each call: when it was
due, how long it took from then (None without a response), and how it ended. As clients of gRPC do, it opens another
connection after a GOAWAY or the end of its connection, and repeats calls that the server says it has not begun.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.siege.wire import INFER, LIVE, Connection, dataframes, framed, head, pin_to_client_core
from mesh.h2 import frames
from shoal.inference.v2 import inference_pb2 as pb

OK = "status 0"
PATIENCE_S = 30.0
"""Time that calls without a response are waited for at the end."""

Call = tuple[float, float | None, str]
"""Time when it was due, seconds until its response, outcome."""


def question() -> tuple[bytes, bytes]:
    """Return a request for the model `small`, and the bytes of the right answer."""
    row = np.array([1, 2, 3, 4], np.float32)
    request = pb.ModelInferRequest(model_name="small")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(row.tobytes())
    return framed(request.SerializeToString()), (2 * row).tobytes()


class Bystander:
    """Calls of one bystander."""

    def __init__(self, address: str, tenant: str, *, is_probe: bool = False) -> None:
        self._address = address
        self._head = head(LIVE if is_probe else INFER, tenant=tenant)
        self._body, self._answer = (framed(b""), b"\x08\x01") if is_probe else question()
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
        number, opening = connection.open(self._head)
        self._due[connection, number] = due
        connection.send(opening + dataframes(number, self._body, frames.END_STREAM))

    def _connect(self) -> None:
        connection: Connection

        def on_end(number: int, outcome: str, body: bytes) -> None:
            due = self._due.pop((connection, number))
            if outcome == "reset REFUSED_STREAM":
                self._repeat(due)
                return
            is_wrong = outcome == OK and self._answer not in body
            self.calls.append((due, time.monotonic() - due, "wrong answer" if is_wrong else outcome))

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


def main() -> None:
    address, tenant, rate, *live = sys.argv[1:]
    bystander = Bystander(address, tenant, is_probe=bool(live))
    pin_to_client_core(has_precedence=True)
    print("ready", flush=True)
    times: dict[str, Any] = json.loads(sys.stdin.readline())
    calls = bystander.run(times["start"], times["end"], float(rate))
    json.dump({"calls": calls, "repeated": bystander.repeated}, sys.stdout)


if __name__ == "__main__":
    main()
