"""Kinesis: a stream as a source, a stream as a sink.

    coordinator ──lists shards, acquires its share, renews leases──> a reader for each held shard ──batches──> receive
    settle ──> offsets of the shard ──> checkpoint in MongoDB, under the shard's lease

A shard that was split or merged is read to its end before its children are started, so that the order of a key is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document
from mesh.mongo_clock import Clock, milliseconds
from mesh.process.tasks import end
from services.ingest.connectors import aggregated, envelope
from services.ingest.connectors.checkpoints import CheckpointRepository
from services.ingest.connectors.message import Message, Outgoing, Partition
from services.ingest.connectors.offset_tracker import OffsetTracker
from services.ingest.connectors.progress import PartitionProgress, SourceStatus
from services.ingest.connectors.shards import Checkpoint, Shard, plan_changes, reads_from_start
from services.ingest.group_commit import Group
from shoal.errors import InvalidArgument, PermissionDenied, ShoalError, Unavailable

log = logging.getLogger(__name__)

_READ_AT_ONCE = 500
_BATCHES = 2
# Readers that may hold a page (at most 10 MB) at once, however many shards are held. The others wait.
_READERS = 4
_CHECKPOINT_S = 0.25
_BACKOFF_S = 1.0
_PUT_RECORDS = 500
# PutRecords accepts 5 MiB, keys included.
_PUT_BYTES = 4 << 20
_RECORD_BYTES = 1 << 20
_KEY_CHARS = 256
_NOT_ALLOWED = frozenset({"AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException"})


@dataclass(frozen=True, slots=True)
class Access:
    """Stream, region and endpoint. Credentials are found as AWS' own tools find them."""

    stream: str
    region: str
    endpoint: str | None = None


@dataclass(eq=False, slots=True)
class ShardReader:
    """State of a shard that this instance reads."""

    shard: Shard
    lease: str
    partition: Partition
    start: Checkpoint
    from_beginning: bool
    began_at: datetime | None = None
    """Time at which the shard was started at its latest record; durable before any record is read."""
    is_iterated: bool = False
    """True once an iterator at the latest record was requested: a second such iterator would skip records."""
    offsets: OffsetTracker = field(default_factory=OffsetTracker)
    unsettled: dict[int, int] = field(default_factory=dict)
    """Number of unsettled messages, by the record's sequence number: a record may hold many messages."""
    saved: int | None = None
    is_at_end: bool = False
    behind_ms: int | None = None
    task: asyncio.Task[None] | None = None

    def received(self, number: int, messages: int) -> None:
        """Record the arrival of a record with `messages` messages."""
        self.offsets.received(number)
        self.unsettled[number] = messages
        if not messages:
            self.settle(number)

    def settle(self, number: int) -> None:
        """Settle one message of a record; the last message settles the record."""
        left = self.unsettled.pop(number, 0) - 1
        if left > 0:
            self.unsettled[number] = left
        else:
            self.offsets.settled(number)


class KinesisSource:
    """Source that reads a stream's shards, shared with other instances."""

    def __init__(
        self,
        connector: str,
        access: Access,
        collection: AsyncCollection[Document],
        *,
        me: str,
        clock: Clock,
        start: str,
        lease_ms: int,
        poll_ms: int,
    ) -> None:
        self._connector = connector
        self._access = access
        self._collection = collection
        self._me = me
        self._clock = clock
        self._start = start
        self._lease_ms = lease_ms
        self._poll_s = poll_ms / 1_000
        self._stack = AsyncExitStack()
        self._shard_readers: dict[str, ShardReader] = {}
        self._batches: asyncio.Queue[Sequence[Message]] = asyncio.Queue(_BATCHES)
        self._readers = asyncio.Semaphore(_READERS)
        self._left: Sequence[Message] = ()
        self._failed: asyncio.Future[None] | None = None
        self._problem = ""
        self._listed_at: datetime | None = None
        """Time of the last listing of shards, by Kinesis' clock, to the second."""

    async def __aenter__(self) -> KinesisSource:
        self._client = await self._stack.enter_async_context(_client(self._access))
        with _translated(f"describing stream {self._access.stream}"):
            summary = await self._client.describe_stream_summary(StreamName=self._access.stream)
        made: datetime = summary["StreamDescriptionSummary"]["StreamCreationTimestamp"]
        # A stream that was deleted and created again has shards of the same names with other records.
        name = f"{self._connector}/{self._access.stream}@{milliseconds(made)}"
        self._checkpoints = CheckpointRepository(
            self._collection, name, me=self._me, clock=self._clock, lease_ms=self._lease_ms
        )
        self._failed = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._report_failure(self._coordinate()), name=f"kinesis {name}"),
            asyncio.create_task(self._report_failure(self._save_periodically()), name=f"checkpoints {name}"),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end(*self._tasks, *(each.task for each in self._shard_readers.values() if each.task is not None))
        # Messages whose checkpoint is not saved are delivered again.
        with contextlib.suppress(ShoalError):
            await self._save()
            for shard_reader in list(self._shard_readers.values()):
                await self._checkpoints.release(shard_reader.shard.id, shard_reader.lease)
            await self._checkpoints.leave()
        for shard_reader in self._shard_readers.values():
            shard_reader.partition.mark_revoked()
        await self._stack.aclose()

    async def receive(self, limit: int) -> Sequence[Message]:
        if not self._left:
            self._left = await self._next()
        some, self._left = self._left[:limit], self._left[limit:]
        return some

    def settle(self, message: Message) -> None:
        shard_reader = self._shard_readers.get(message.partition.name)
        if shard_reader is not None and shard_reader.partition is message.partition:
            shard_reader.settle(message.position)

    def status(self) -> SourceStatus:
        partitions = [
            PartitionProgress(name, str(each.saved or each.start.sequence))
            for name, each in sorted(self._shard_readers.items())
        ]
        behind = [each.behind_ms for each in self._shard_readers.values() if each.behind_ms is not None]
        return SourceStatus(tuple(partitions), self._problem, max(behind) if behind else None)

    async def _next(self) -> Sequence[Message]:
        assert self._failed is not None
        getting = asyncio.create_task(self._batches.get())
        try:
            either: list[asyncio.Future[Any]] = [getting, self._failed]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            self._failed.result()
            raise AssertionError("the future of a failure has no result")
        finally:
            getting.cancel()

    async def _report_failure(self, work: Any) -> None:
        """Await a task; report its error to `receive`."""
        assert self._failed is not None
        try:
            await work
        except Exception as err:
            if not self._failed.done():
                self._failed.set_exception(err)
                # Marks the error as retrieved, because `receive` may not be called any more.
                self._failed.exception()

    async def _coordinate(self) -> None:
        while True:
            try:
                await self._rebalance()
                self._problem = ""
            except ShoalError as err:
                self._problem = err.message
            await asyncio.sleep(min(self._lease_ms / 3_000, 2.0))

    async def _rebalance(self) -> None:
        """Renew the leases of held shards, and acquire or release shards to reach the fair share."""
        for shard in await self._checkpoints.renew({name: each.lease for name, each in self._shard_readers.items()}):
            await self._drop_reader(shard)
        listed = await self._shards()
        for name, shard_reader in self._shard_readers.items():
            shard_reader.shard = listed.get(name, shard_reader.shard)
        checkpoints = await self._checkpoints.all()
        due = plan_changes(
            list(listed.values()),
            checkpoints,
            me=self._me,
            others=await self._checkpoints.live_instances(),
            held=self._shard_readers.keys(),
            now=self._clock(),
        )
        for shard in due.release:
            lease = self._shard_readers[shard].lease
            await self._save()
            await self._drop_reader(shard)
            await self._checkpoints.release(shard, lease)
        for shard in due.acquire:
            if (acquired := await self._checkpoints.acquire(shard)) is not None:
                lease, checkpoint = acquired
                self._read(listed[shard], lease, checkpoint, reads_from_start(listed[shard], checkpoints))

    def _read(self, shard: Shard, lease: str, checkpoint: Checkpoint, from_beginning: bool) -> None:
        shard_reader = ShardReader(shard, lease, Partition(shard.id), checkpoint, from_beginning)
        self._shard_readers[shard.id] = shard_reader
        shard_reader.task = asyncio.create_task(
            self._report_failure(self._read_to_end(shard_reader)), name=f"shard {shard.id}"
        )

    async def _drop_reader(self, shard: str) -> None:
        shard_reader = self._shard_readers.pop(shard)
        if shard_reader.task is not None:
            await end(shard_reader.task)
        shard_reader.partition.mark_revoked()

    async def _shards(self) -> dict[str, Shard]:
        found: dict[str, Shard] = {}
        more: dict[str, str] = {"StreamName": self._access.stream}
        while more:
            with _translated(f"listing the shards of {self._access.stream}"):
                page = await self._client.list_shards(**more)
            self._listed_at = _date(page) or self._listed_at
            found.update({each["ShardId"]: _shard(each) for each in page["Shards"]})
            more = {"NextToken": page["NextToken"]} if page.get("NextToken") else {}
        return found

    async def _read_to_end(self, shard_reader: ShardReader) -> None:
        """Read a shard to its end, or until the task is cancelled."""
        after = shard_reader.start.sequence
        iterator: str | None = None
        while True:
            try:
                if not await self._ensure_start(shard_reader):
                    # The lease was lost; the coordinator drops this reader.
                    return
                if iterator is None and (iterator := await self._iterator(shard_reader, after)) is None:
                    return
                # Kinesis returns no iterator after the end of a closed shard, but some compatible servers do. Then only
                # an empty read that started after the shard was known to be closed shows its end.
                was_closed = shard_reader.shard.is_closed
                async with self._readers:
                    with _translated(f"reading shard {shard_reader.shard.id}"):
                        page = await self._client.get_records(ShardIterator=iterator, Limit=_READ_AT_ONCE)
                    iterator = page.get("NextShardIterator")
                    shard_reader.behind_ms = page.get("MillisBehindLatest")
                    if records := page["Records"]:
                        after = records[-1]["SequenceNumber"]
                        await self._deliver_messages(shard_reader, records)
            except ShoalError as err:
                self._problem = err.message
                # The iterator may have expired; a new one continues at the same position.
                iterator = None
                await asyncio.sleep(_BACKOFF_S)
                continue
            if records:
                continue
            if iterator is None or (was_closed and not shard_reader.behind_ms):
                shard_reader.is_at_end = True
                return
            await asyncio.sleep(self._poll_s)

    async def _deliver_messages(self, shard_reader: ShardReader, records: Sequence[dict[str, Any]]) -> None:
        messages = (message for record in records for message in self._messages(shard_reader, record))
        while batch := tuple(itertools.islice(messages, _READ_AT_ONCE)):
            await self._batches.put(batch)

    async def _ensure_start(self, shard_reader: ShardReader) -> bool:
        """Make the start of a shard that begins at its latest record durable. False: the lease was lost.

        The next reader continues from there, even if nothing was settled. Kinesis has no sequence number for the
        position after the latest record. So the start is a time by Kinesis' clock, read before the iterator: after a
        kill, some older records may be read again, and none is skipped.
        """
        is_latest = self._start == "latest" and not shard_reader.from_beginning and not shard_reader.start.sequence
        if not is_latest or shard_reader.began_at is not None:
            return True
        if (at := shard_reader.start.began_at) is not None:
            shard_reader.is_iterated = True
        else:
            at = self._listed_at or self._clock()
            if not await self._checkpoints.record_start(shard_reader.shard.id, shard_reader.lease, at):
                return False
        shard_reader.began_at = at
        return True

    async def _iterator(self, shard_reader: ShardReader, after: str) -> str | None:
        arguments: dict[str, Any] = {"StreamName": self._access.stream, "ShardId": shard_reader.shard.id}
        if after:
            arguments |= {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "StartingSequenceNumber": after}
        elif self._start == "latest" and not shard_reader.from_beginning:
            if not shard_reader.is_iterated:
                arguments["ShardIteratorType"] = "LATEST"
                shard_reader.is_iterated = True
            else:
                # The shard was read before, or a read failed: records that arrived since must not be skipped.
                arguments |= {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": shard_reader.began_at}
        else:
            arguments["ShardIteratorType"] = "TRIM_HORIZON"
        with _translated(f"reading shard {shard_reader.shard.id}"):
            found: str | None = (await self._client.get_shard_iterator(**arguments)).get("ShardIterator")
        return found

    def _messages(self, shard_reader: ShardReader, record: dict[str, Any]) -> Iterator[Message]:
        """Yield the messages of a record: one, or those that the Kinesis Producer Library aggregated."""
        number, data = record["SequenceNumber"], record["Data"]
        arrived: datetime | None = record.get("ApproximateArrivalTimestamp")
        location = f"{self._access.stream}/{shard_reader.shard.id}/{number}"

        def message(location: str, key: bytes, value: bytes) -> Message:
            received_ms = 0 if arrived is None else milliseconds(arrived)
            return Message(shard_reader.partition, int(number), location, value, key, received_ms=received_ms)

        packed = aggregated.unpack(data)
        shard_reader.received(int(number), 1 if packed is None else len(packed))
        if packed is None:
            yield message(location, record["PartitionKey"].encode(), data)
        else:
            for at, (key, value) in enumerate(packed):
                yield message(f"{location}/{at}", key, value)

    async def _save_periodically(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_S)
            try:
                await self._save()
            except ShoalError as err:
                self._problem = err.message

    async def _save(self) -> None:
        """Save the checkpoints of shards with newly settled records, and drop finished shards."""
        for shard, shard_reader in list(self._shard_readers.items()):
            to = shard_reader.offsets.settled_up_to
            is_finished = shard_reader.is_at_end and not shard_reader.offsets.in_flight
            if to == shard_reader.saved and not is_finished:
                continue
            sequence = None if to is None else str(to)
            if await self._checkpoints.advance(shard, shard_reader.lease, sequence=sequence, is_finished=is_finished):
                shard_reader.saved = to
            if is_finished and self._shard_readers.get(shard) is shard_reader:
                await self._drop_reader(shard)


class KinesisSink:
    """Sink that writes to a stream: a record holds the message and its headers (`envelope`)."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._stack = AsyncExitStack()
        self._group: Group[dict[str, Any], None] = Group(
            f"records for {access.stream}",
            self._put,
            max_items=_PUT_RECORDS,
            max_bytes=_PUT_BYTES,
            size=lambda record: len(record["Data"]) + len(record["PartitionKey"].encode()),
        )

    async def __aenter__(self) -> KinesisSink:
        self._client = await self._stack.enter_async_context(_client(self._access))
        await self._stack.enter_async_context(self._group)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def send(self, message: Outgoing) -> None:
        data, key = envelope.pack(message), _partition_key(message)
        # Kinesis would reject the whole group of a record that is too large, at each retry.
        if (nbytes := len(data) + len(key.encode())) > _RECORD_BYTES:
            raise InvalidArgument(f"a Kinesis record holds at most {_RECORD_BYTES} bytes, and this takes {nbytes}")
        await self._group.put({"Data": data, "PartitionKey": key})

    async def _put(self, records: list[dict[str, Any]]) -> Sequence[ShoalError | None]:
        with _translated(f"writing to stream {self._access.stream}"):
            response = await self._client.put_records(StreamName=self._access.stream, Records=records)
        return [
            Unavailable(f"stream {self._access.stream}: {each['ErrorCode']}: {each.get('ErrorMessage', '')}")
            if each.get("ErrorCode")
            else None
            for each in response["Records"]
        ]


def _partition_key(message: Outgoing) -> str:
    """Return the partition key of a record: the message's key as text, else its source."""
    key = (message.key or b"").decode(errors="replace") or dict(message.headers).get("shoal-source", b"-").decode()
    return key[:_KEY_CHARS]


def _date(response: dict[str, Any]) -> datetime | None:
    """Return the time of a response by the server's clock, rounded down to seconds; None when it is missing."""
    date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(date).astimezone(UTC)
    except ValueError:
        return None


def _shard(listed: dict[str, Any]) -> Shard:
    parents = (listed.get("ParentShardId"), listed.get("AdjacentParentShardId"))
    is_closed = bool(listed["SequenceNumberRange"].get("EndingSequenceNumber"))
    return Shard(listed["ShardId"], tuple(parent for parent in parents if parent), is_closed)


@asynccontextmanager
async def _client(access: Access) -> AsyncIterator[Any]:
    config = AioConfig(connect_timeout=5, read_timeout=15, retries={"max_attempts": 2, "mode": "standard"})
    with _translated("reaching Kinesis"):
        making = get_session().create_client(
            "kinesis", region_name=access.region, endpoint_url=access.endpoint, config=config
        )
        client = await making.__aenter__()
    try:
        yield client
    finally:
        await making.__aexit__(None, None, None)


@contextlib.contextmanager
def _translated(doing: str) -> Any:
    """Translate the errors of AWS' library to ShoalError."""
    try:
        yield
    except ClientError as err:
        code = err.response.get("Error", {}).get("Code", "")
        text = f"{doing}: {code}: {err.response.get('Error', {}).get('Message', '')}"
        if code in _NOT_ALLOWED:
            raise PermissionDenied(text) from err
        if code == "ResourceNotFoundException":
            raise Unavailable(f"{doing}: there is no such stream: create it") from err
        raise Unavailable(text) from err
    except (BotoCoreError, HTTPClientError) as err:
        raise Unavailable(f"{doing}: {err}") from err
