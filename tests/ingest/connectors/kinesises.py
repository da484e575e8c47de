"""moto's server, which speaks Kinesis' protocol, and streams of a test's own on it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from pymongo import AsyncMongoClient

from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.ingest.connectors.brokers import Received

REGION = "us-east-1"
KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": REGION}


def aggregate(messages: Sequence[tuple[str, bytes]]) -> bytes:
    """A record of the Kinesis Producer Library: (partition key, value) of each message, byte by byte."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(data)) + data

    body = b"".join(field(1, key.encode()) for key, _ in messages)
    for at, (_, value) in enumerate(messages):
        body += field(3, b"\x08" + _varint(at) + field(3, value))
    return sealed(body)


def sealed(body: bytes) -> bytes:
    """`body` as such a record has its protobuf message."""
    return b"\xf3\x89\x9a\xc2" + body + hashlib.md5(body, usedforsecurity=False).digest()


def _varint(number: int) -> bytes:
    more, last = divmod(number, 128)
    return bytes([last]) if not more else bytes([last | 128]) + _varint(more)


class Moto(Process):
    """The server, in memory."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        argv = [sys.executable, str(Path(__file__).parent / "moto_server.py"), "-H", "127.0.0.1", "-p", str(port)]
        super().__init__(argv, folder / "moto.log")

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/moto-api/data.json", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def client(self) -> Any:
        return boto3.client("kinesis", endpoint_url=self.endpoint, **KEYS)


class Kinesis:
    """Three streams."""

    keeps_order = True

    def __init__(self, moto: Moto, mongo_uri: str, database: str, shards: int = 2) -> None:
        mark = uuid.uuid4().hex[:12]
        self._client = moto.client()
        self._mongo = (mongo_uri, database)
        self._shards = shards
        self.stream, self._out, self._dead = (f"{name}-{mark}" for name in ("in", "out", "dead"))
        common = {"kind": "kinesis", "region": REGION, "endpoint": moto.endpoint}
        self.table: dict[str, dict[str, Any]] = {
            "source": {**common, "stream": self.stream, "lease_ms": 2_000, "poll_ms": 100},
            "sink": {**common, "stream": self._out},
            "dead_letters": {**common, "stream": self._dead},
        }
        self.published: list[tuple[str, int]] = []
        """Shard and sequence number of each message."""

    async def make(self) -> Kinesis:
        for name, shards in ((self.stream, self._shards), (self._out, 1), (self._dead, 1)):
            await asyncio.to_thread(self._client.create_stream, StreamName=name, ShardCount=shards)

        async def active() -> bool:
            about = await asyncio.to_thread(self._client.describe_stream_summary, StreamName=self._dead)
            return bool(about["StreamDescriptionSummary"]["StreamStatus"] == "ACTIVE")

        await until(active, "streams")
        return self

    async def publish(self, values: Sequence[bytes]) -> None:
        await asyncio.to_thread(self._publish, values)

    def _publish(self, values: Sequence[bytes]) -> None:
        for n, value in enumerate(values):
            # Halves of the space of hashes: messages go to the shards in turn.
            half = str((n % 2) * (1 << 127))
            done = self._client.put_record(
                StreamName=self.stream, Data=value, PartitionKey=f"k{n}", ExplicitHashKey=half
            )
            self.published.append((done["ShardId"], int(done["SequenceNumber"])))

    def publish_to_each(self, value: bytes, count: int) -> None:
        """So many messages to each shard."""
        for shard in self._client.list_shards(StreamName=self.stream)["Shards"]:
            start = shard["HashKeyRange"]["StartingHashKey"]
            records = [{"Data": value, "PartitionKey": "k", "ExplicitHashKey": start}] * count
            self._client.put_records(StreamName=self.stream, Records=records)

    async def answers(self) -> list[Received]:
        return await asyncio.to_thread(self._all_of, self._out)

    async def dead(self) -> list[Received]:
        return await asyncio.to_thread(self._all_of, self._dead)

    async def settled(self) -> int:
        uri, database = self._mongo
        async with AsyncMongoClient[dict[str, Any]](uri) as client:
            kept = await client[database]["checkpoints"].find({"kind": "shard"}).to_list()
        to = {each["shard"]: int(each["sequence"]) for each in kept if each.get("sequence")}
        return sum(number <= to.get(shard, -1) for shard, number in self.published)

    def _all_of(self, stream: str) -> list[Received]:
        try:
            (shard,) = self._client.list_shards(StreamName=stream)["Shards"]
            iterator = self._client.get_shard_iterator(
                StreamName=stream, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )["ShardIterator"]
            found: list[Received] = []
            while records := (page := self._client.get_records(ShardIterator=iterator, Limit=1_000))["Records"]:
                found += [_received(record["Data"]) for record in records]
                iterator = page["NextShardIterator"]
            return found
        except (BotoCoreError, ClientError) as err:
            raise AssertionError(err) from err


def _received(data: bytes) -> Received:
    document = json.loads(data)
    value = document["value"].encode() if "value" in document else base64.b64decode(document["value_base64"])
    return Received(value, document["headers"])
