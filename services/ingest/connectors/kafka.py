"""Kafka: a topic as a source, a topic as a sink.

A dedicated thread drives librdkafka. It polls (which keeps the membership in the group and serves rebalances), passes
messages to the event loop, and commits the settled offsets.

    event loop   receive ──request──> thread: consume ──messages──> event loop ... settle ──> thread: offsets ──> commit

While the connector's window is full, `receive` is not called: then the partitions are paused, and polling goes on. The
settled offsets of a revoked partition are committed; its other messages are delivered to its next owner.

With `start` = latest, the start offset of a new partition is committed before any message is read. So an instance that
is killed before its first commit skips no message.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import methodcaller
from typing import Any

import confluent_kafka
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, KafkaException, TopicPartition

from services.ingest.connectors.message import Message, Outgoing, Partition
from services.ingest.connectors.offset_tracker import OffsetTracker
from services.ingest.connectors.progress import PartitionProgress, SourceStatus
from shoal.errors import Internal, InvalidArgument, ShoalError, Unavailable

log = logging.getLogger(__name__)

_POLL_S = 0.1
_COMMIT_S = 0.1
# Time without a request after which partitions are paused: librdkafka drops its fetched messages, and refetches later.
_PAUSE_AFTER_S = 1.0
_STATUS_S = 1.0
# Timeouts of queries to the broker, during which nothing is consumed: for the start offsets, and for its health.
_OFFSETS_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 1.0
# Leaving the group waits for a response of the broker.
_LEAVE_S = 8.0
_SEND_S = 30
_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG, KafkaError.INVALID_MSG_SIZE})
_NO_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})


class KafkaSource:
    """Source that consumes a topic as a member of a group. `options` of librdkafka override the defaults."""

    def __init__(self, brokers: str, topic: str, group: str, *, start: str, options: Mapping[str, str]) -> None:
        self._topic = topic
        self._start = start
        self._config: dict[str, Any] = {
            "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 2_000,
            # Delay until a created or deleted topic is noticed; the default is five minutes.
            "topic.metadata.refresh.interval.ms": 10_000,
            **options,
            "bootstrap.servers": brokers,
            "group.id": group,
            # Applies also when the committed offset was deleted from the topic: all remaining messages are read.
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "error_cb": self._on_error,
            "logger": log,
        }
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._request: tuple[int, asyncio.Future[list[Message]]] | None = None
        self._settled: deque[Message] = deque()
        self._failed: ShoalError | None = None
        # Used only by the thread:
        self._assigned: dict[int, tuple[Partition, OffsetTracker]] = {}
        self._committed: dict[int, int] = {}
        self._start_offsets: dict[int, int] = {}
        """Start offsets of partitions without a committed offset."""
        self._no_topic = self._not_committed = self._problem = ""
        """Errors of the topic, of commits and of the broker; each is kept until the operation succeeds again."""
        # Written by the thread, read by any thread: the object is replaced as a whole.
        self._status = SourceStatus()
        self.is_paused = False
        """True while partitions are paused, because `receive` was not called for a while."""

    async def __aenter__(self) -> KafkaSource:
        self._loop = asyncio.get_running_loop()
        try:
            consumer = confluent_kafka.Consumer(self._config)
        except (KafkaException, TypeError, ValueError) as err:
            raise InvalidArgument(f"Kafka does not take these options: {err}") from err
        self._thread = threading.Thread(target=self._serve, args=(consumer,), name=f"kafka {self._topic}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop.set()
        self._wake.set()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join, _LEAVE_S)

    async def receive(self, limit: int) -> Sequence[Message]:
        if self._failed is not None:
            raise self._failed
        future: asyncio.Future[list[Message]] = self._loop.create_future()
        self._request = (limit, future)
        self._wake.set()
        return await future

    def settle(self, message: Message) -> None:
        self._settled.append(message)

    def status(self) -> SourceStatus:
        return self._status

    def _serve(self, consumer: Any) -> None:
        """Body of the thread."""
        try:
            consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            self._poll(consumer)
        except Exception as err:
            self._fail(_translated(err, f"consuming {self._topic}"))
        finally:
            try:
                self._commit(consumer)
                consumer.close()
            except Exception as err:
                log.warning(
                    "leaving topic %(topic)s: %(error)s",
                    {"event": "connector.kafka_leave_failed", "topic": self._topic, "error": err},
                )
            for partition, _ in self._assigned.values():
                _call_on(self._loop, partition.mark_revoked)

    def _poll(self, consumer: Any) -> None:
        requested_at = time.monotonic()
        next_commit = next_status = 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= next_commit:
                self._commit(consumer)
                next_commit = now + _COMMIT_S
            if now >= next_status:
                self._update_status(consumer)
                next_status = now + _STATUS_S
            if (request := self._request) is not None:
                requested_at = now
                if self.is_paused:
                    consumer.resume(consumer.assignment())
                    self.is_paused = False
                self._deliver_messages(request, _consumed(consumer, request[0]))
            elif now - requested_at < _PAUSE_AFTER_S:
                self._wake.wait(_POLL_S)
                self._wake.clear()
            else:
                # In each iteration, because a rebalance assigns new partitions, which are not paused.
                consumer.pause(consumer.assignment())
                self.is_paused = True
                self._seek_back(consumer, consumer.poll(_POLL_S))

    def _deliver_messages(self, request: tuple[int, asyncio.Future[list[Message]]], consumed: Sequence[Any]) -> None:
        messages = [made for each in consumed if (made := self._message(each)) is not None]
        if messages:
            self._request = None
            _call_on(self._loop, _resolve, request[1], messages)

    def _seek_back(self, consumer: Any, message: Any) -> None:
        """Seek back to a message that arrived although all partitions are paused, so that it is fetched again."""
        if message is not None and message.error() is None:
            consumer.seek(TopicPartition(message.topic(), message.partition(), message.offset()))

    def _message(self, consumed: Any) -> Message | None:
        if (error := consumed.error()) is not None:
            self._handle_error(error)
            return None
        if (held := self._assigned.get(consumed.partition())) is None:
            # The partition was revoked meanwhile.
            return None
        partition, offsets = held
        offsets.received(consumed.offset())
        self._no_topic = self._problem = ""
        _, received_ms = consumed.timestamp()
        return Message(
            partition=partition,
            position=consumed.offset(),
            location=f"{self._topic}/{consumed.partition()}/{consumed.offset()}",
            value=consumed.value() or b"",
            key=consumed.key(),
            headers=_headers(consumed),
            received_ms=max(0, received_ms),
        )

    def _handle_error(self, error: Any) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            return
        if error.code() in _NO_TOPIC:
            self._no_topic = f"there is no topic {self._topic}: create it"
        elif error.fatal():
            raise KafkaException(error)
        else:
            self._problem = f"Kafka: {error.str()}"

    def _commit(self, consumer: Any) -> None:
        while self._settled:
            message = self._settled.popleft()
            held = self._assigned.get(int(message.partition.name))
            if held is not None and held[0] is message.partition:
                held[1].settled(message.position)
        self._commit_partitions(consumer, self._assigned)

    def _commit_partitions(self, consumer: Any, partitions: Mapping[int, object]) -> None:
        due = {
            partition: offsets.settled_up_to + 1
            for partition, (_, offsets) in self._assigned.items()
            if partition in partitions
            and offsets.settled_up_to is not None
            and self._committed.get(partition) != offsets.settled_up_to + 1
        }
        self._not_committed = ""
        if not due:
            return
        offsets = [self._of(partition, offset) for partition, offset in due.items()]
        try:
            committed = consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as err:
            # During a rebalance or an outage: the commit is retried, or the next owner gets the messages again.
            self._not_committed = f"cannot commit: {err.args[0].str()}"
            return
        for each in committed or ():
            if each.error is None:
                self._committed[each.partition] = each.offset
            else:
                self._not_committed = f"cannot commit partition {each.partition}: {each.error.str()}"

    def _on_assign(self, consumer: Any, partitions: Sequence[Any]) -> None:
        for each in partitions:
            self._assigned[each.partition] = (Partition(str(each.partition)), OffsetTracker())
            self._committed.pop(each.partition, None)
            self._start_offsets.pop(each.partition, None)
        if partitions:
            self._no_topic = self._problem = ""
            self._load_positions(consumer, partitions)

    def _load_positions(self, consumer: Any, partitions: Sequence[Any]) -> None:
        """Read the start offsets of partitions before any message is fetched. An error restarts the source."""
        found = _without_errors(
            consumer.committed([self._of(each.partition) for each in partitions], timeout=_OFFSETS_TIMEOUT_S)
        )
        self._committed |= {each.partition: each.offset for each in found if each.offset >= 0}
        new = [each.partition for each in found if each.offset < 0]
        if not new:
            return
        edge = OFFSET_END if self._start == "latest" else OFFSET_BEGINNING
        starts = _without_errors(
            consumer.offsets_for_times([self._of(each, edge) for each in new], timeout=_OFFSETS_TIMEOUT_S)
        )
        if self._start == "latest":
            starts = _without_errors(consumer.commit(offsets=starts, asynchronous=False))
            self._committed |= {each.partition: each.offset for each in starts}
        else:
            self._start_offsets |= {each.partition: each.offset for each in starts}

    def _of(self, partition: int, *offset: int) -> TopicPartition:
        return TopicPartition(self._topic, partition, *offset)

    def _on_revoke(self, consumer: Any, partitions: Sequence[Any]) -> None:
        self._commit(consumer)
        self._on_lost(consumer, partitions)

    def _on_lost(self, consumer: Any, partitions: Sequence[Any]) -> None:
        for each in partitions:
            if (held := self._assigned.pop(each.partition, None)) is not None:
                _call_on(self._loop, held[0].mark_revoked)

    def _update_status(self, consumer: Any) -> None:
        """Replace the status that reports show."""
        if self._problem and self._is_well(consumer):
            self._problem = ""
        ends = self._ends(consumer) if self.is_paused else {}
        partitions = [self._partition_progress(consumer, partition, ends) for partition in sorted(self._assigned)]
        self._status = SourceStatus(tuple(partitions), self._problem or self._no_topic or self._not_committed)

    def _ends(self, consumer: Any) -> dict[int, int]:
        """Return the end offset of each assigned partition; none without an answer of the broker.

        A paused consumer fetches nothing, and so learns no end by itself: its lag would stand still.
        """
        try:
            return {each.partition: each.offset for each in self._queried_ends(consumer)}
        except KafkaException:
            return {}

    def _queried_ends(self, consumer: Any) -> Sequence[Any]:
        wanted = [self._of(partition, OFFSET_END) for partition in self._assigned]
        found: Sequence[Any] = _without_errors(consumer.offsets_for_times(wanted, timeout=_HEALTH_TIMEOUT_S))
        return found

    def _is_well(self, consumer: Any) -> bool:
        """Query the broker, because the library reports a lost broker, but not its return."""
        try:
            if self._assigned:
                self._queried_ends(consumer)
            else:
                _without_errors(consumer.committed([self._of(0)], timeout=_HEALTH_TIMEOUT_S))
        except KafkaException:
            return False
        return True

    def _partition_progress(self, consumer: Any, partition: int, ends: Mapping[int, int]) -> PartitionProgress:
        committed = self._committed.get(partition)
        position = self._start_offsets.get(partition) if committed is None else committed
        try:
            _, high = consumer.get_watermark_offsets(self._of(partition), cached=True)
        except KafkaException:
            high = -1
        high = max(high, ends.get(partition, -1))
        return PartitionProgress(
            str(partition),
            "" if committed is None else str(committed),
            None if position is None or high < 0 else max(0, high - position),
        )

    def _on_error(self, error: Any) -> None:
        self._problem = f"Kafka: {error.str()}"

    def _fail(self, error: ShoalError) -> None:
        """Report the error that ended the thread to the pending `receive`, or to the next one."""
        self._problem = error.message

        def report() -> None:
            self._failed = error
            if self._request is not None and not self._request[1].done():
                self._request[1].set_exception(error)

        _call_on(self._loop, report)


class KafkaSink:
    """Sink that produces to a topic: a message counts as sent when every in-sync replica has it."""

    def __init__(self, brokers: str, topic: str, *, options: Mapping[str, str]) -> None:
        self._topic = topic
        self._config: dict[str, Any] = {
            "linger.ms": 5,
            "compression.type": "lz4",
            "delivery.timeout.ms": _SEND_S * 1_000,
            **options,
            "bootstrap.servers": brokers,
            "acks": "all",
            "enable.idempotence": True,
            "logger": log,
        }
        self._stop = threading.Event()

    async def __aenter__(self) -> KafkaSink:
        self._loop = asyncio.get_running_loop()
        try:
            self._producer = confluent_kafka.Producer(self._config)
        except (KafkaException, TypeError, ValueError) as err:
            raise InvalidArgument(f"Kafka does not take these options: {err}") from err
        self._thread = threading.Thread(target=self._serve, name=f"kafka {self._topic}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join, _LEAVE_S)

    async def send(self, message: Outgoing) -> None:
        future: asyncio.Future[None] = self._loop.create_future()

        def delivered(error: Any, _: Any) -> None:
            _call_on(self._loop, _settle, future, None if error is None else self._send_error(error))

        while True:
            try:
                self._producer.produce(
                    self._topic,
                    message.value,
                    message.key,
                    headers=[(name, value) for name, value in message.headers],
                    on_delivery=delivered,
                )
                break
            except BufferError:
                # The local queue is full, because the broker is slow or unavailable.
                await asyncio.sleep(_POLL_S)
            except KafkaException as err:
                raise self._send_error(err.args[0]) from err
        await future

    def _send_error(self, error: Any) -> ShoalError:
        if error.code() in _TOO_LARGE:
            return InvalidArgument(f"topic {self._topic} rejects the message: {error.str()}")
        if error.code() in _NO_TOPIC:
            return Unavailable(f"there is no topic {self._topic}: create it")
        if error.fatal():
            return Internal(f"producing to {self._topic}: {error.str()}")
        return Unavailable(f"producing to {self._topic}: {error.str()}")

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._producer.poll(_POLL_S)
        # No caller waits for the queued messages; they are sent again after a restart.
        self._producer.purge()
        self._producer.poll(0)


def _call_on(loop: asyncio.AbstractEventLoop, act: Callable[..., object], *args: object) -> None:
    """Call `act` on `loop` from another thread. A closed loop has no receiver, so nothing happens."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(act, *args)


def _without_errors(partitions: Sequence[Any]) -> Sequence[Any]:
    """Return `partitions` when the broker reports no error for any of them."""
    for each in partitions:
        if each.error is not None:
            raise KafkaException(each.error)
    return partitions


def _consumed(consumer: Any, limit: int) -> list[Any]:
    """Return up to `limit` available messages after the first arrived. (`consume` alone waits for all of them.)"""
    first = consumer.poll(_POLL_S)
    return [] if first is None else [first, *consumer.consume(limit - 1, 0)] if limit > 1 else [first]


# Not consumed.headers(): for a name that is no UTF-8, the library returns null pointers and sets an error, which
# CPython's specialised calls do not check. Access to such a pointer ends the process.
_headers_of = methodcaller("headers")


def _headers(consumed: Any) -> tuple[tuple[str, bytes], ...]:
    try:
        return tuple((name, value or b"") for name, value in _headers_of(consumed) or ())
    except (SystemError, UnicodeDecodeError) as err:
        # A name is no UTF-8, so the library returns no headers. The message goes on without them, or its partition
        # would stop.
        log.warning(
            "the headers of %(partition)s/%(offset)s cannot be read: %(error)s",
            {
                "event": "connector.kafka_headers_unreadable",
                "partition": consumed.partition(),
                "offset": consumed.offset(),
                "error": err,
            },
        )
        return ()


def _resolve(future: asyncio.Future[list[Message]], messages: list[Message]) -> None:
    if not future.done():
        future.set_result(messages)


def _settle(future: asyncio.Future[None], error: ShoalError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _translated(error: Exception, doing: str) -> ShoalError:
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, KafkaException):
        return Unavailable(f"{doing}: {error.args[0].str()}")
    log.error("%(doing)s", {"event": "connector.kafka_failed", "doing": doing}, exc_info=error)
    return Internal(f"{doing}: an unexpected error; the log has the cause")
