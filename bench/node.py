"""Start time of a node, calls through the gateway beside direct calls to an instance, and jobs per second.

    python bench/node.py [--rounds 5] [--seconds 3] [--in-flight 32] [--jobs 2000]

One tiny model (x [1,4] FP32 -> 2x), one replica. Rounds interleave the measurements, so that drifting machine speed
affects all alike: trust the ratios. Client and node share the machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from rich.table import Table

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import inference_pb2_grpc as oip_grpc
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc

MODEL = "double"
# Number of results per query.
_QUERY_SIZE = 100


def save_model(path: Path) -> None:
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [make.make_tensor_value_info("x", kind, ["N", 4])],
        [make.make_tensor_value_info("y", kind, ["N", 4])],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9), path)


def question() -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    return request


def start(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, object], float]:
    """Start a node on `folder`; return its process, its ready document, and the seconds until ready."""
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "shoal.cli.main", "up", "--data-dir", str(folder / "data"), "--gateway-port", "0"]
    command += ["--admin-port", "0", "--ready-file", str(ready)]
    began = time.perf_counter()
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not ready.exists():
        if node.poll() is not None:
            sys.exit("the node did not start: run `shoal up` to see why")
        time.sleep(0.01)
    return node, json.loads(ready.read_text()), time.perf_counter() - began


def stop(node: subprocess.Popen[bytes]) -> float:
    began = time.perf_counter()
    node.send_signal(signal.SIGTERM)
    if node.wait(60) != 0:
        sys.exit(f"the node stopped with {node.returncode}")
    return time.perf_counter() - began


def socket_of(pid: object) -> str:
    """Return the listen address of an instance, from its environment."""
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(v.partition(b"=")[2].decode() for v in environ if v.startswith(b"SHOAL_INFER_LISTEN="))


async def calls_per_second(address: str, in_flight: int, seconds: float) -> tuple[float, float]:
    """Return calls/s and the median latency in ms of `in_flight` callers that never pause."""
    async with connect(address) as channel:
        stub, request, latencies = oip_grpc.GRPCInferenceServiceStub(channel), question(), list[float]()
        await stub.ModelInfer(request)
        end = time.perf_counter() + seconds

        async def call() -> None:
            while (began := time.perf_counter()) < end:
                await stub.ModelInfer(request)
                latencies.append(time.perf_counter() - began)

        await asyncio.gather(*(call() for _ in range(in_flight)))
    return len(latencies) / seconds, statistics.median(latencies) * 1e3


async def jobs_per_second(gateway: str, count: int) -> tuple[float, float]:
    """Submit `count` jobs on one stream and wait for all results; return acknowledged/s and ended/s."""
    async with connect(gateway) as channel:
        ingest = ingest_pb2_grpc.IngestServiceStub(channel)

        async def requests() -> AsyncIterator[ingest_pb2.SubmitStreamRequest]:
            for n in range(count):
                submit = ingest_pb2.SubmitRequest(request=question())
                yield ingest_pb2.SubmitStreamRequest(sequence=n, submit=submit)

        began = time.perf_counter()
        ids = [answer.job_id async for answer in ingest.SubmitStream(requests())]
        accepted = time.perf_counter() - began
        store = store_pb2_grpc.StoreServiceStub(channel)
        # Start with the last jobs: once they have results, almost all others have, too.
        for last in range(count, 0, -_QUERY_SIZE):
            await wait_for_results(store, ids[max(0, last - _QUERY_SIZE) : last])
        return count / accepted, count / (time.perf_counter() - began)


async def wait_for_results(store: store_pb2_grpc.StoreServiceStub, ids: list[str]) -> None:
    query = store_pb2.QueryResultsRequest(job_ids=ids, omit_response=True, page_size=len(ids))
    while True:
        found = await store.QueryResults(query)
        if len(found.results) == len(ids):
            return
        await asyncio.sleep(0.01)


async def job_latency_ms(gateway: str, count: int) -> float:
    """Return the median time from submit to a readable result, one job at a time."""
    async with connect(gateway) as channel:
        ingest, store = ingest_pb2_grpc.IngestServiceStub(channel), store_pb2_grpc.StoreServiceStub(channel)
        latencies = []
        for _ in range(count):
            began = time.perf_counter()
            answer = await ingest.Submit(ingest_pb2.SubmitRequest(request=question()))
            await store.GetResult(store_pb2.GetResultRequest(job_id=answer.job.id, wait=Duration(seconds=5)))
            latencies.append(time.perf_counter() - began)
    return statistics.median(latencies) * 1e3


def measure(rounds: int, seconds: float, in_flight: int, jobs: int) -> list[tuple[str, list[float], str]]:
    rows: dict[str, tuple[list[float], str]] = {}

    def note(name: str, value: float, form: str) -> None:
        rows.setdefault(name, ([], form))[0].append(value)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_RUNTIME_DIR"] = str(folder)
        save_model(folder / f"{MODEL}.onnx")
        for again in range(rounds):
            node, _, took = start(folder)
            note("start, s (first: empty data folder)" if not again else "start on existing data, s", took, "{:.1f}")
            note("stop, s", stop(node), "{:.1f}")
        node, document, _ = start(folder)
        push = [sys.executable, "-m", "shoal.cli.main", "models", "push", str(folder / f"{MODEL}.onnx")]
        subprocess.run(push, check=True, stdout=subprocess.DEVNULL)
        gateway = str(document["gateway"])
        pids = document["pids"]
        assert isinstance(pids, dict)
        direct = socket_of(pids["infer-0"])
        run: Callable[..., tuple[float, float]] = lambda *a: asyncio.run(calls_per_second(*a))  # noqa: E731
        for _ in range(rounds):
            straight, through = run(direct, in_flight, seconds), run(gateway, in_flight, seconds)
            note(f"calls/s directly to the instance, {in_flight} in flight", straight[0], "{:,.0f}")
            note(f"calls/s through the gateway, {in_flight} in flight", through[0], "{:,.0f}")
            note("ratio of gateway to direct", through[0] / straight[0], "{:.2f}")
            alone, behind = run(direct, 1, seconds / 3), run(gateway, 1, seconds / 3)
            note("one in flight, p50 ms, direct", alone[1], "{:.2f}")
            note("one in flight, p50 ms, through the gateway", behind[1], "{:.2f}")
            accepted, ended = asyncio.run(jobs_per_second(gateway, jobs))
            note("jobs acknowledged/s, one stream", accepted, "{:,.0f}")
            note("jobs ended/s, submit to last result", ended, "{:,.0f}")
            note("one job at a time, submit to result, p50 ms", asyncio.run(job_latency_ms(gateway, 100)), "{:.1f}")
        stop(node)
    return [(name, values, form) for name, (values, form) in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2000)
    args = parser.parse_args()
    table = Table("what", "median", "least", "most")
    for name, values, form in measure(args.rounds, args.seconds, args.in_flight, args.jobs):
        table.add_row(name, *(form.format(v) for v in (statistics.median(values), min(values), max(values))))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
