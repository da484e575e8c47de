"""Kinesis: a stream as a source, a stream as a sink.

    coordinator ──lists shards, takes its share, renews leases──> a reader for each shard held ──batches──> receive
    settle ──> ledger of the shard ──> checkpoint in MongoDB, under the shard's lease

A shard that was split or merged is read to its end before its children are begun, so that what was written with one key
is read in its order.
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
from mesh.process.tasks import end
from services.ingest.clock import Clock, milliseconds
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
_READERS = 4
# Pages of at most 10 MB that are read ahead: those of so many readers, however many shards there are. The others wait.
_CHECKPOINT_S = 0.25
_BACKOFF_S = 1.0
_PUT_RECORDS = 500
_PUT_BYTES = 4 << 20
# PutRecords takes 5 MiB, keys included.
_RECORD_BYTES = 1 << 20
_KEY_CHARS = 256
_NOT_ALLOWED = frozenset({"AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException"})


@dataclass(frozen=True, slots=True)
class Access:
    """How Kinesis is reached. Keys come from where AWS' own tools find them."""

    stream: str
    region: str
    endpoint: str | None = None


@dataclass(eq=False, slots=True)
class ShardReader:
    """A shard that this instance holds."""

    shard: Shard
    lease: str
    lane: Partition
    start: Checkpoint
    from_beginning: bool
    began_at: datetime | None = None
    """Where it was begun with its latest record; durable before anything is read."""
    is_begun: bool = False
    """An iterator at its latest record was asked for once: another such would pass over what came since."""
    ledger: OffsetTracker = field(default_factory=OffsetTracker)
    unsettled: dict[int, int] = field(default_factory=dict)
    """How many messages of a record are not settled, by its number: a record may hold many."""
    saved: int | None = None
    is_read_out: bool = False
    behind_ms: int | None = None
    task: asyncio.Task[None] | None = None

    def received(self, number: int, messages: int) -> None:
        """A record has come, with so many messages in it."""
        self.ledger.received(number)
        self.unsettled[number] = messages
        if not messages:
            self.settle(number)

    def settle(self, number: int) -> None:
        """A message of a record is done with: the last of them settles the record."""
        left = self.unsettled.pop(number, 0) - 1
        if left > 0:
            self.unsettled[number] = left
        else:
            self.ledger.settled(number)


class KinesisSource:
    """Reads a stream together with other instances, each its share of the shards."""

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
        self._readings: dict[str, ShardReader] = {}
        self._batches: asyncio.Queue[Sequence[Message]] = asyncio.Queue(_BATCHES)
        self._readers = asyncio.Semaphore(_READERS)
        self._left: Sequence[Message] = ()
        self._failed: asyncio.Future[None] | None = None
        self._problem = ""
        self._seen_at: datetime | None = None
        """When Kinesis last listed the shards, by its own clock, to the second."""

    async def __aenter__(self) -> KinesisSource:
        self._client = await self._stack.enter_async_context(_client(self._access))
        with _translated(f"looking at stream {self._access.stream}"):
            summary = await self._client.describe_stream_summary(StreamName=self._access.stream)
        made: datetime = summary["StreamDescriptionSummary"]["StreamCreationTimestamp"]
        # Shards of a stream that was deleted and made again have the same names, and other records.
        name = f"{self._connector}/{self._access.stream}@{milliseconds(made)}"
        self._checkpoints = CheckpointRepository(
            self._collection, name, me=self._me, clock=self._clock, lease_ms=self._lease_ms
        )
        self._failed = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._guarded(self._coordinate()), name=f"kinesis {name}"),
            asyncio.create_task(self._guarded(self._save_now_and_then()), name=f"checkpoints {name}"),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end(*self._tasks, *(each.task for each in self._readings.values() if each.task is not None))
        with contextlib.suppress(ShoalError):  # What is not saved is delivered again.
            await self._save()
            for reading in list(self._readings.values()):
                await self._checkpoints.release(reading.shard.id, reading.lease)
            await self._checkpoints.leave()
        for reading in self._readings.values():
            reading.lane.mark_revoked()
        await self._stack.aclose()

    async def receive(self, limit: int) -> Sequence[Message]:
        if not self._left:
            self._left = await self._next()
        some, self._left = self._left[:limit], self._left[limit:]
        return some

    def settle(self, message: Message) -> None:
        reading = self._readings.get(message.lane.name)
        if reading is not None and reading.lane is message.lane:
            reading.settle(message.position)

    def status(self) -> SourceStatus:
        lanes = [
            PartitionProgress(name, str(each.saved or each.start.sequence))
            for name, each in sorted(self._readings.items())
        ]
        behind = [each.behind_ms for each in self._readings.values() if each.behind_ms is not None]
        return SourceStatus(tuple(lanes), self._problem, max(behind) if behind else None)

    async def _next(self) -> Sequence[Message]:
        assert self._failed is not None
        getting = asyncio.create_task(self._batches.get())
        try:
            either: list[asyncio.Future[Any]] = [getting, self._failed]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            self._failed.result()
            raise AssertionError("it only ever has an error")
        finally:
            getting.cancel()

    async def _guarded(self, work: Any) -> None:
        """A task that fails is told to whoever receives."""
        assert self._failed is not None
        try:
            await work
        except Exception as err:
            if not self._failed.done():
                self._failed.set_exception(err)
                self._failed.exception()  # It may be that nobody receives any more.

    async def _coordinate(self) -> None:
        while True:
            try:
                await self._share()
                self._problem = ""
            except ShoalError as err:
                self._problem = err.message
            await asyncio.sleep(min(self._lease_ms / 3_000, 2.0))

    async def _share(self) -> None:
        """Renews what is held, and takes or gives back what is due."""
        for shard in await self._checkpoints.renew({name: each.lease for name, each in self._readings.items()}):
            await self._lose(shard)
        listed = await self._shards()
        for name, reading in self._readings.items():
            reading.shard = listed.get(name, reading.shard)
        checkpoints = await self._checkpoints.all()
        due = plan_changes(
            list(listed.values()),
            checkpoints,
            me=self._me,
            others=await self._checkpoints.others(),
            held=self._readings.keys(),
            now=self._clock(),
        )
        for shard in due.release:
            lease = self._readings[shard].lease
            await self._save()
            await self._lose(shard)
            await self._checkpoints.release(shard, lease)
        for shard in due.take:
            if (taken := await self._checkpoints.take(shard)) is not None:
                lease, checkpoint = taken
                self._read(listed[shard], lease, checkpoint, reads_from_start(listed[shard], checkpoints))

    def _read(self, shard: Shard, lease: str, checkpoint: Checkpoint, from_beginning: bool) -> None:
        reading = ShardReader(shard, lease, Partition(shard.id), checkpoint, from_beginning)
        self._readings[shard.id] = reading
        reading.task = asyncio.create_task(self._guarded(self._read_out(reading)), name=f"shard {shard.id}")

    async def _lose(self, shard: str) -> None:
        reading = self._readings.pop(shard)
        if reading.task is not None:
            await end(reading.task)
        reading.lane.mark_revoked()

    async def _shards(self) -> dict[str, Shard]:
        found: dict[str, Shard] = {}
        more: dict[str, str] = {"StreamName": self._access.stream}
        while more:
            with _translated(f"listing the shards of {self._access.stream}"):
                page = await self._client.list_shards(**more)
            self._seen_at = _date(page) or self._seen_at
            found.update({each["ShardId"]: _shard(each) for each in page["Shards"]})
            more = {"NextToken": page["NextToken"]} if page.get("NextToken") else {}
        return found

    async def _read_out(self, reading: ShardReader) -> None:
        """Reads a shard to its end, or until it is cancelled."""
        after = reading.start.sequence
        iterator: str | None = None
        while True:
            try:
                if not await self._begun(reading):
                    return  # The lease was lost; whoever renews leases ends this.
                if iterator is None and (iterator := await self._iterator(reading, after)) is None:
                    return
                # Kinesis gives no iterator behind the end of a closed shard; some who speak its protocol do. Only what
                # is read after it was known to be closed shows that nothing more comes.
                was_closed = reading.shard.is_closed
                async with self._readers:
                    with _translated(f"reading shard {reading.shard.id}"):
                        page = await self._client.get_records(ShardIterator=iterator, Limit=_READ_AT_ONCE)
                    iterator = page.get("NextShardIterator")
                    reading.behind_ms = page.get("MillisBehindLatest")
                    if records := page["Records"]:
                        after = records[-1]["SequenceNumber"]
                        await self._deliver_messages(reading, records)
            except ShoalError as err:
                self._problem = err.message
                iterator = None  # It may have expired; a new one goes on at the same place.
                await asyncio.sleep(_BACKOFF_S)
                continue
            if records:
                continue
            if iterator is None or (was_closed and not reading.behind_ms):
                reading.is_read_out = True
                return
            await asyncio.sleep(self._poll_s)

    async def _deliver_messages(self, reading: ShardReader, records: Sequence[dict[str, Any]]) -> None:
        messages = (message for record in records for message in self._messages(reading, record))
        while batch := tuple(itertools.islice(messages, _READ_AT_ONCE)):
            await self._batches.put(batch)

    async def _begun(self, reading: ShardReader) -> bool:
        """Sees to it that the place where a shard is begun with its latest record is durable, so that whoever reads it
        next goes on from there, although nothing was settled. False: the lease was lost.

        Kinesis gives no number to the place behind the latest record. So it is a time, by Kinesis' clock and taken
        before the iterator: after a kill some records may come that were there already, and none is passed over.
        """
        is_latest = self._start == "latest" and not reading.from_beginning and not reading.start.sequence
        if not is_latest or reading.began_at is not None:
            return True
        if (at := reading.start.began_at) is not None:
            reading.is_begun = True
        else:
            at = self._seen_at or self._clock()
            if not await self._checkpoints.begin(reading.shard.id, reading.lease, at):
                return False
        reading.began_at = at
        return True

    async def _iterator(self, reading: ShardReader, after: str) -> str | None:
        about: dict[str, Any] = {"StreamName": self._access.stream, "ShardId": reading.shard.id}
        if after:
            about |= {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "StartingSequenceNumber": after}
        elif self._start == "latest" and not reading.from_beginning:
            if not reading.is_begun:
                about["ShardIteratorType"] = "LATEST"
                reading.is_begun = True
            else:  # It was read before, or a read has failed: what came meanwhile is not to be passed over.
                about |= {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": reading.began_at}
        else:
            about["ShardIteratorType"] = "TRIM_HORIZON"
        with _translated(f"reading shard {reading.shard.id}"):
            found: str | None = (await self._client.get_shard_iterator(**about)).get("ShardIterator")
        return found

    def _messages(self, reading: ShardReader, record: dict[str, Any]) -> Iterator[Message]:
        """What a record holds: itself, or what the Kinesis Producer Library has packed into it."""
        number, data = record["SequenceNumber"], record["Data"]
        arrived: datetime | None = record.get("ApproximateArrivalTimestamp")
        place = f"{self._access.stream}/{reading.shard.id}/{number}"

        def message(place: str, key: bytes, value: bytes) -> Message:
            stamp = 0 if arrived is None else milliseconds(arrived)
            return Message(reading.lane, int(number), place, value, key, stamp=stamp)

        packed = aggregated.opened(data)
        reading.received(int(number), 1 if packed is None else len(packed))
        if packed is None:
            yield message(place, record["PartitionKey"].encode(), data)
        else:
            for at, (key, value) in enumerate(packed):
                yield message(f"{place}/{at}", key, value)

    async def _save_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_S)
            try:
                await self._save()
            except ShoalError as err:
                self._problem = err.message

    async def _save(self) -> None:
        """Writes what is settled."""
        for shard, reading in list(self._readings.items()):
            to = reading.ledger.settled_up_to
            is_finished = reading.is_read_out and not reading.ledger.in_flight
            if to == reading.saved and not is_finished:
                continue
            sequence = None if to is None else str(to)
            if await self._checkpoints.move(shard, reading.lease, sequence=sequence, is_finished=is_finished):
                reading.saved = to
            if is_finished and self._readings.get(shard) is reading:
                await self._lose(shard)


class KinesisSink:
    """Writes to a stream: a record holds the message and its headers (`envelope`)."""

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
        data, key = envelope.packed(message), _partition_key(message)
        # One that Kinesis refuses would have all of its group refused, again and again.
        if (nbytes := len(data) + len(key.encode())) > _RECORD_BYTES:
            raise InvalidArgument(f"a Kinesis record holds at most {_RECORD_BYTES} bytes, and this takes {nbytes}")
        await self._group.put({"Data": data, "PartitionKey": key})

    async def _put(self, records: list[dict[str, Any]]) -> Sequence[ShoalError | None]:
        with _translated(f"writing to stream {self._access.stream}"):
            answer = await self._client.put_records(StreamName=self._access.stream, Records=records)
        return [
            Unavailable(f"stream {self._access.stream}: {each['ErrorCode']}: {each.get('ErrorMessage', '')}")
            if each.get("ErrorCode")
            else None
            for each in answer["Records"]
        ]


def _partition_key(message: Outgoing) -> str:
    """Whatever spreads records: the message's key as text, or else where it came from."""
    key = (message.key or b"").decode(errors="replace") or dict(message.headers).get("shoal-source", b"-").decode()
    return key[:_KEY_CHARS]


def _date(answer: dict[str, Any]) -> datetime | None:
    """When it was given, by the clock of who gave it; whole seconds, none later than it was."""
    given = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(given).astimezone(UTC)
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
    """Raises the errors of AWS' library as ShoalError."""
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
