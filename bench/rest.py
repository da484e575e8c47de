"""REST of `shoal serve` beside its own gRPC, and beside Triton's REST, under the same load on loopback.

    python bench/rest.py [--triton COMMAND] [--rounds 5] [--seconds 1] [--loads tiny@1,tiny@64]

A shell runs COMMAND, which starts a Triton as for bench/fronts.py, and takes the options in $TRITON_ARGS. Requests are
encoded once; every answer is compared with the expected one. `json`: tensors as JSON, both ways; `binary`: raw behind
the JSON, both ways. In flight means connections. Servers run on processor 0 with one thread for the model, the
generator on the other processors. Rounds interleave all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from fronts import Contender, Load, Network, shoal, show, triton
from infer import ROOT, Measured, Server, loaded
from infer_models import Sample, save
from oip_load import Count, Requests
from rich.console import Console

from shoal.node.processes import free_port

LOADS: tuple[Load, ...] = (("tiny", 1), ("tiny", 64), ("mlp", 1), ("mlp", 64))
FORMS = ("binary", "json")
_TOLERANCE = 1e-3
_WARM_UP_S = 0.3


@dataclass(frozen=True)
class RestRequests:
    """Whole encoded requests of HTTP/1.1, with their expected answers."""

    requests: Sequence[bytes]
    answers: Sequence[np.ndarray]

    @classmethod
    def of(cls, sample: Sample, form: str) -> RestRequests:
        made = []
        for row in sample.inputs:
            tensor: dict[str, Any] = {"name": "input", "datatype": "FP32", "shape": [1, *row.shape]}
            if form == "json":
                tensor["data"] = [float(f"{value:.8g}") for value in row.reshape(-1)]
                body, more = json.dumps({"inputs": [tensor]}).encode(), b""
            else:
                tensor["parameters"] = {"binary_data_size": row.nbytes}
                head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
                body, more = head + row.tobytes(), b"Inference-Header-Content-Length: %d\r\n" % len(head)
            path = b"/v2/models/%b/infer" % sample.name.encode()
            made.append(
                b"POST %b HTTP/1.1\r\nHost: bench\r\n%bContent-Length: %d\r\n\r\n%b" % (path, more, len(body), body)
            )
        return cls(made, list(sample.outputs))

    def is_right(self, number: int, headers: bytes, body: bytes) -> bool:
        length = _number(headers, b"\r\ninference-header-content-length:")
        if length is None:
            got = np.array(json.loads(body)["outputs"][0]["data"], np.float32)
        else:
            got = np.frombuffer(body[length:], np.float32)
        return bool(np.allclose(got, self.answers[number].reshape(-1), rtol=0, atol=_TOLERANCE))


def _number(headers: bytes, name: bytes) -> int | None:
    at = headers.find(name)
    return None if at < 0 else int(headers[at + len(name) :].partition(b"\r\n")[0])


class _Connection(asyncio.Protocol):
    """One connection with one request in flight."""

    def __init__(self, load: RestLoad) -> None:
        self._load = load
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is of no common class.
        self.ask()

    def ask(self) -> None:
        self._number = self._load.next()
        self._at = time.perf_counter()
        self._transport.write(self._load.requests.requests[self._number])

    def data_received(self, data: bytes) -> None:
        self._data = data = self._data + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        headers = data[: end + 2].lower()
        size = _number(headers, b"\r\ncontent-length:")
        assert size is not None, headers
        if len(data) < end + 4 + size:
            return
        self._data = b""
        self._load.answered(self._number, self._at, headers, data[end + 4 :])
        if not self._load.is_over:
            self.ask()

    def close(self) -> None:
        self._transport.abort()


class RestLoad:
    """A closed loop over REST."""

    def __init__(self, address: str, requests: RestRequests) -> None:
        self._address = address
        self.requests = requests
        self.count = Count()
        self._next = 0
        self._is_counted = self.is_over = False

    def next(self) -> int:
        self._next = (self._next + 1) % len(self.requests.requests)
        return self._next

    def answered(self, number: int, at: float, headers: bytes, body: bytes) -> None:
        if not self._is_counted:
            return
        code = int(headers[9:12])
        if code != 200:
            self.count.by_status[code] = self.count.by_status.get(code, 0) + 1
        elif self.requests.is_right(number, headers, body):
            self.count.good += 1
            self.count.latencies_s.append(time.perf_counter() - at)
        else:
            self.count.wrong += 1

    async def closed(self, in_flight: int, seconds: float, server: Server) -> tuple[Count, float]:
        """Run the loop; return the counts, and the processor time of the server."""
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        opened = [await loop.create_connection(lambda: _Connection(self), host, int(port)) for _ in range(in_flight)]
        await asyncio.sleep(_WARM_UP_S)
        cpu_s, start, self._is_counted = server.cpu_s(), time.perf_counter(), True
        await asyncio.sleep(seconds)
        self._is_counted, self.is_over = False, True
        self.count.seconds, cpu_s = time.perf_counter() - start, server.cpu_s() - cpu_s
        for _, connection in opened:
            connection.close()
        return self.count, cpu_s


@dataclass
class Row:
    """One contender of the table."""

    name: str
    loads: dict[Load, Measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", metavar="COMMAND", help="starts a Triton at $HOST:$PORT with the models of $MODELS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        models, network = Path(scratch), Network("127.0.0.1")
        samples = save(models)
        contenders: list[tuple[Contender, int | None]] = [(shoal("Shoal", ROOT, models, network), None)]
        if args.triton:
            http_port = free_port()
            made = triton(args.triton, models, network)
            made.environ["TRITON_ARGS"] = f"--allow-http=true --http-address=127.0.0.1 --http-port={http_port}"
            contenders.append((made, http_port))
        rows: dict[str, Row] = {}
        requests = {(name, form): RestRequests.of(samples[name], form) for name in ("tiny", "mlp") for form in FORMS}
        grpc_requests = {
            name: Requests.of(name, samples[name].inputs, samples[name].outputs) for name in ("tiny", "mlp")
        }
        servers = [(each, port, stack.enter_context(each.running(samples["tiny"]))) for each, port in contenders]
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
            for load in LOADS:
                model, in_flight = load
                for each, port, server in servers:
                    address = server.address if port is None else f"127.0.0.1:{port}"
                    for form in FORMS:
                        run = RestLoad(address, requests[model, form])
                        counted = uvloop.run(run.closed(in_flight, args.seconds, server))
                        row = rows.setdefault(f"{each.name} REST {form}", Row(f"{each.name} REST {form}", {}))
                        row.loads.setdefault(load, Measured()).add(*counted)
                    counted = uvloop.run(loaded(server, grpc_requests[model], in_flight, args.seconds))
                    row = rows.setdefault(f"{each.name} gRPC", Row(f"{each.name} gRPC", {}))
                    row.loads.setdefault(load, Measured()).add(*counted)
    order = [f"{name} {form}" for form in ("REST binary", "REST json", "gRPC") for name in ("Triton", "Shoal")]
    show("REST on loopback", [rows[name] for name in order if name in rows], LOADS, Console(width=140))


if __name__ == "__main__":
    main()
