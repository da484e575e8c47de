"""Shoal's side of the comparison: a node, the CPU time and memory of its processes, and clients that submit jobs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from pymongo import MongoClient

import shoal
from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.node.processes import mongo_uri
from shoal.store.v1 import store_pb2, store_pb2_grpc

PARTS = ("mongod", "envoy", "ingest-0", "infer-0", "store-0")

EACH = 100
"""Jobs per message of a stream, as the client library sends them."""


def question(model: str, number: float = 1.0) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.full(4, number, np.float32).tobytes())
    return request


def row(number: float) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the inputs of `question` in the form for the client library."""
    return {"x": np.full((1, 4), number, np.float32)}


class Node:
    """A running `shoal up`."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder = folder
        self.ready = folder / "ready.json"
        self.ready.unlink(missing_ok=True)
        self.environ = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        command = [sys.executable, "-m", "shoal.cli.main", "up", "--data-dir", str(folder / "data"), "--json"]
        command += ["--gateway-port", "0", "--admin-port", "0", "--ready-file", str(self.ready), *args]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=self.environ)
        while not self.ready.exists():
            if self.process.poll() is not None:
                sys.exit("the node did not start: run `shoal up` to see why")
            time.sleep(0.02)
        self.gateway = str(self.document()["gateway"])
        argv = Path(f"/proc/{self.pids()['mongod']}/cmdline").read_text().split("\0")
        self.mongo: MongoClient[dict[str, object]] = MongoClient(
            f"{mongo_uri(argv[argv.index('--bind_ip') + 1])}?directConnection=true"
        )

    def document(self) -> dict[str, object]:
        document: dict[str, object] = json.loads(self.ready.read_text())
        return document

    def pids(self) -> dict[str, int]:
        pids = self.document()["pids"]
        assert isinstance(pids, dict)
        return pids

    def push(self, path: Path) -> None:
        push = [sys.executable, "-m", "shoal.cli.main", "models", "push", str(path)]
        subprocess.run(push, check=True, stdout=subprocess.DEVNULL, env=self.environ)

    def results(self) -> int:
        """Return the number of stored results, from a counter of the database, without a scan."""
        return self.mongo["shoal"]["results"].estimated_document_count()

    def jobs(self) -> int:
        """Return the number of stored jobs, from a counter of the database, without a scan."""
        return self.mongo["shoal"]["jobs"].estimated_document_count()

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds of each process so far."""
        found = {}
        for name, pid in self.pids().items():
            if name in PARTS:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found

    def rss_mb(self, part: str) -> float:
        pages = int(Path(f"/proc/{self.pids()[part]}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> None:
        self.mongo.close()
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60) != 0:
            sys.exit(f"the node stopped with {self.process.returncode}")


@contextmanager
def node(folder: Path, *args: str) -> Iterator[Node]:
    running = Node(folder, *args)
    try:
        yield running
    finally:
        running.stop()


async def unary(gateway: str, model: str, clients: int, count: int) -> float:
    """Return accepted jobs/s of concurrent clients that wait for each answer, each with its own connection."""
    numbers = iter(range(count))

    async def client() -> None:
        async with shoal.AsyncClient(gateway) as node:
            for number in numbers:
                await node.jobs.submit(model, row(number))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - began)


async def unary_grpc(gateway: str, model: str, clients: int, count: int) -> float:
    """Return the rate of `unary` with generated stubs over grpc.aio, and without idempotency keys."""
    numbers = iter(range(count))

    async def client() -> None:
        async with connect(gateway) as channel:
            stub = ingest_pb2_grpc.IngestServiceStub(channel)
            for number in numbers:
                await stub.Submit(ingest_pb2.SubmitRequest(request=question(model, number)))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - began)


async def streamed(gateway: str, model: str, count: int, *, each: int = EACH) -> float:
    """Return acknowledged jobs/s on one stream, with `each` jobs per message."""
    submit = ingest_pb2.SubmitRequest(request=question(model))
    async with connect(gateway) as channel:
        began = time.perf_counter()
        await acknowledged(channel, messages([submit] * count, each))
        return count / (time.perf_counter() - began)


def messages(submits: list[ingest_pb2.SubmitRequest], each: int = EACH) -> Iterator[ingest_pb2.SubmitStreamRequest]:
    for first in range(0, len(submits), each):
        if each == 1:
            yield ingest_pb2.SubmitStreamRequest(sequence=first, submit=submits[first])
        else:
            yield ingest_pb2.SubmitStreamRequest(sequence=first, submits=submits[first : first + each])


async def acknowledged(channel: grpc.aio.Channel, requests: Iterator[ingest_pb2.SubmitStreamRequest]) -> None:
    """Send one stream of jobs; exit if a job is rejected."""
    async for answer in ingest_pb2_grpc.IngestServiceStub(channel).SubmitStream(requests):
        for ack in answer.acknowledgements or (answer,):
            if not ack.job_id:
                sys.exit(f"job {ack.sequence} was rejected: {ack.message}")


async def latency(gateway: str, model: str, count: int) -> dict[str, float]:
    """Return p50 and p99 in ms from submit to the read result, one job at a time, at most 20 per second."""
    took = []
    async with shoal.AsyncClient(gateway) as node:
        for number in range(count):
            began = time.perf_counter()
            job = await node.jobs.submit(model, row(number))
            await node.jobs.result(job.id)
            took.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.03)
    return _quantiles(took)


async def latency_grpc(gateway: str, model: str, count: int) -> dict[str, float]:
    """Return the latency as `latency`, with generated stubs over grpc.aio; the store waits for the result."""
    took = []
    wait = Duration(seconds=5)
    async with connect(gateway) as channel:
        ingest, store = ingest_pb2_grpc.IngestServiceStub(channel), store_pb2_grpc.StoreServiceStub(channel)
        for number in range(count):
            began = time.perf_counter()
            answer = await ingest.Submit(ingest_pb2.SubmitRequest(request=question(model, number)))
            await store.GetResult(store_pb2.GetResultRequest(job_id=answer.job.id, wait=wait))
            took.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.03)
    return _quantiles(took)


async def stream_latency(gateway: str, model: str, count: int) -> dict[str, float]:
    """Return the latency as `latency`, on one open RunStream over grpc.aio, which delivers the result."""
    took = []
    async with connect(gateway) as channel:
        call = ingest_pb2_grpc.IngestServiceStub(channel).RunStream()
        for number in range(count):
            submit = ingest_pb2.SubmitRequest(request=question(model, number))
            began = time.perf_counter()
            await call.write(ingest_pb2.RunStreamRequest(sequence=number, submit=submit))
            while not (await call.read()).HasField("response"):
                pass
            took.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.03)
        await call.done_writing()
    return _quantiles(took)


def _quantiles(took: list[float]) -> dict[str, float]:
    took.sort()
    return {"p50": statistics.median(took), "p99": took[int(len(took) * 0.99) - 1]}


async def numbered(gateway: str, model: str, count: int) -> None:
    """Submit `count` jobs on one stream, each with its own number."""
    submits = [ingest_pb2.SubmitRequest(request=question(model, number)) for number in range(count)]
    async with connect(gateway) as channel:
        await acknowledged(channel, messages(submits))
