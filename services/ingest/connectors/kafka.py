"""Kafka: a topic as a source, a topic as a sink.

librdkafka is driven by a thread of its own: it polls (which keeps the membership in the group and serves rebalances),
hands messages to the event loop, and commits what is settled, after the fact.

    event loop   receive ──wanted──> thread: consume ──messages──> event loop ... settle ──> thread: ledger ──> commit

Nobody asks for messages while the connector's window is full: then partitions are paused, and polled on. A partition
that is revoked is committed as far as it is settled, and lost: its messages go to whoever has it next.

Where a partition is begun with its latest message is committed before anything of it is read: an instance that is
killed before anything was settled passes nothing over.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
_PAUSE_AFTER_S = 1.0
# Nobody wanted messages for so long: what librdkafka holds is dropped, and fetched again later.
_LAG_S = 1.0
_PLACE_S = 5.0
_ASK_S = 1.0
# Nothing is consumed while the broker is asked where partitions go on, or whether it is well.
_LEAVE_S = 8.0
# Leaving the group takes an answer of the broker.
_SEND_S = 30
_TOO_MUCH = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG, KafkaError.INVALID_MSG_SIZE})
_NO_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})


class KafkaSource:
    """Consumes a topic as a member of a group. `options` are librdkafka's, over ours."""

    def __init__(self, brokers: str, topic: str, group: str, *, start: str, options: Mapping[str, str]) -> None:
        self._topic = topic
        self._start = start
        self._config: dict[str, Any] = {
            "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 2_000,
            # How soon a topic is found that was just made, or missed that was deleted: five minutes, if nobody says so.
            "topic.metadata.refresh.interval.ms": 10_000,
            **options,
            "bootstrap.servers": brokers,
            "group.id": group,
            # Also where what was committed is gone from the topic: whatever is still there is read.
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "error_cb": self._on_error,
            "logger": log,
        }
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._wanted: tuple[int, asyncio.Future[list[Message]]] | None = None
        self._settled: deque[Message] = deque()
        self._failed: ShoalError | None = None
        # The thread's own:
        self._lanes: dict[int, tuple[Partition, OffsetTracker]] = {}
        self._committed: dict[int, int] = {}
        self._begins: dict[int, int] = {}
        """Where partitions begin of which nothing is committed."""
        self._no_topic = self._not_committed = self._problem = ""
        """What is wrong, each until it is seen to be well again."""
        # Written by the thread, read by anyone: swapped whole.
        self._status = SourceStatus()
        self.is_paused = False
        """Nobody has asked for messages for a while."""

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
        self._wanted = (limit, future)
        self._wake.set()
        return await future

    def settle(self, message: Message) -> None:
        self._settled.append(message)

    def status(self) -> SourceStatus:
        return self._status

    def _serve(self, consumer: Any) -> None:
        """The thread."""
        try:
            consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_revoked=self._on_lost
            )
            self._poll(consumer)
        except Exception as err:
            self._fail(_translated(err, f"consuming {self._topic}"))
        finally:
            try:
                self._commit(consumer)
                consumer.close()
            except Exception as err:
                log.warning("leaving topic %s: %s", self._topic, err)
            for lane, _ in self._lanes.values():
                self._on_loop(lane.mark_revoked)

    def _poll(self, consumer: Any) -> None:
        asked_at = time.monotonic()
        next_commit = next_look = 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= next_commit:
                self._commit(consumer)
                next_commit = now + _COMMIT_S
            if now >= next_look:
                self._update_status(consumer)
                next_look = now + _LAG_S
            if (wanted := self._wanted) is not None:
                asked_at = now
                if self.is_paused:
                    consumer.resume(consumer.assignment())
                    self.is_paused = False
                self._deliver_messages(wanted, _consumed(consumer, wanted[0]))
            elif now - asked_at < _PAUSE_AFTER_S:
                self._wake.wait(_POLL_S)
                self._wake.clear()
            else:
                consumer.pause(consumer.assignment())  # Again each time: a rebalance brings new ones, which are not.
                self.is_paused = True
                self._seek_back(consumer, consumer.poll(_POLL_S))

    def _deliver_messages(self, wanted: tuple[int, asyncio.Future[list[Message]]], consumed: Sequence[Any]) -> None:
        messages = [made for each in consumed if (made := self._message(each)) is not None]
        if messages:
            self._wanted = None
            self._on_loop(_resolve, wanted[1], messages)

    def _seek_back(self, consumer: Any, message: Any) -> None:
        """A message that came although everything is paused: it is fetched again."""
        if message is not None and message.error() is None:
            consumer.seek(TopicPartition(message.topic(), message.partition(), message.offset()))

    def _message(self, consumed: Any) -> Message | None:
        if (error := consumed.error()) is not None:
            self._handle_error(error)
            return None
        if (held := self._lanes.get(consumed.partition())) is None:
            return None  # Of a partition that was just revoked.
        lane, ledger = held
        ledger.received(consumed.offset())
        self._no_topic = self._problem = ""
        _, stamp = consumed.timestamp()
        return Message(
            lane=lane,
            position=consumed.offset(),
            place=f"{self._topic}/{consumed.partition()}/{consumed.offset()}",
            value=consumed.value() or b"",
            key=consumed.key(),
            headers=_headers(consumed),
            stamp=max(0, stamp),
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
            held = self._lanes.get(int(message.lane.name))
            if held is not None and held[0] is message.lane:
                held[1].settled(message.position)
        self._commit_of(consumer, self._lanes)

    def _commit_of(self, consumer: Any, partitions: Mapping[int, object]) -> None:
        due = {
            partition: ledger.settled_up_to + 1
            for partition, (_, ledger) in self._lanes.items()
            if partition in partitions
            and ledger.settled_up_to is not None
            and self._committed.get(partition) != ledger.settled_up_to + 1
        }
        self._not_committed = ""
        if not due:
            return
        offsets = [self._of(partition, offset) for partition, offset in due.items()]
        try:
            answers = consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as err:
            # A rebalance is under way, or the broker is: tried again, or delivered again to whoever has it next.
            self._not_committed = f"cannot commit: {err.args[0].str()}"
            return
        for answer in answers or ():
            if answer.error is None:
                self._committed[answer.partition] = answer.offset
            else:
                self._not_committed = f"cannot commit partition {answer.partition}: {answer.error.str()}"

    def _on_assign(self, consumer: Any, partitions: Sequence[Any]) -> None:
        for each in partitions:
            self._lanes[each.partition] = (Partition(str(each.partition)), OffsetTracker())
            self._committed.pop(each.partition, None)
            self._begins.pop(each.partition, None)
        if partitions:
            self._no_topic = self._problem = ""
            self._load_positions(consumer, partitions)

    def _load_positions(self, consumer: Any, partitions: Sequence[Any]) -> None:
        """Learns where partitions go on, before anything of them is fetched. What fails here starts the source anew."""
        found = _answered(consumer.committed([self._of(each.partition) for each in partitions], timeout=_PLACE_S))
        self._committed |= {each.partition: each.offset for each in found if each.offset >= 0}
        new = [each.partition for each in found if each.offset < 0]
        if not new:
            return
        edge = OFFSET_END if self._start == "latest" else OFFSET_BEGINNING
        places = _answered(consumer.offsets_for_times([self._of(each, edge) for each in new], timeout=_PLACE_S))
        if self._start == "latest":
            places = _answered(consumer.commit(offsets=places, asynchronous=False))
            self._committed |= {each.partition: each.offset for each in places}
        else:
            self._begins |= {each.partition: each.offset for each in places}

    def _of(self, partition: int, *offset: int) -> TopicPartition:
        return TopicPartition(self._topic, partition, *offset)

    def _on_revoke(self, consumer: Any, partitions: Sequence[Any]) -> None:
        self._commit(consumer)
        self._on_lost(consumer, partitions)

    def _on_lost(self, consumer: Any, partitions: Sequence[Any]) -> None:
        for each in partitions:
            if (held := self._lanes.pop(each.partition, None)) is not None:
                self._on_loop(held[0].mark_revoked)

    def _update_status(self, consumer: Any) -> None:
        """What people see of it."""
        if self._problem and self._is_well(consumer):
            self._problem = ""
        lanes = [self._partition_progress(consumer, partition) for partition in sorted(self._lanes)]
        self._status = SourceStatus(tuple(lanes), self._problem or self._no_topic or self._not_committed)

    def _is_well(self, consumer: Any) -> bool:
        """Asks, because the library tells that a broker went away, and not that it is back."""
        try:
            if self._lanes:
                ends = [self._of(partition, OFFSET_END) for partition in self._lanes]
                _answered(consumer.offsets_for_times(ends, timeout=_ASK_S))
            else:
                _answered(consumer.committed([self._of(0)], timeout=_ASK_S))
        except KafkaException:
            return False
        return True

    def _partition_progress(self, consumer: Any, partition: int) -> PartitionProgress:
        committed = self._committed.get(partition)
        goes_on = self._begins.get(partition) if committed is None else committed
        try:
            _, high = consumer.get_watermark_offsets(self._of(partition), cached=True)
        except KafkaException:
            high = -1
        return PartitionProgress(
            str(partition),
            "" if committed is None else str(committed),
            None if goes_on is None or high < 0 else max(0, high - goes_on),
        )

    def _on_error(self, error: Any) -> None:
        self._problem = f"Kafka: {error.str()}"

    def _fail(self, error: ShoalError) -> None:
        """The thread ends: whoever waits is told, now or with the next call."""
        self._problem = error.message

        def tell() -> None:
            self._failed = error
            if self._wanted is not None and not self._wanted[1].done():
                self._wanted[1].set_exception(error)

        self._on_loop(tell)

    def _on_loop(self, act: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(act, *args)
        except RuntimeError:
            pass  # The loop has ended: nobody is there to be told.


class KafkaSink:
    """Produces to a topic: a message is sent when every in-sync replica has it."""

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
            self._on_loop(_answer, future, None if error is None else self._send_error(error))

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
            except BufferError:  # Its queue is full: the broker is slow, or away.
                await asyncio.sleep(_POLL_S)
            except KafkaException as err:
                raise self._send_error(err.args[0]) from err
        await future

    def _send_error(self, error: Any) -> ShoalError:
        if error.code() in _TOO_MUCH:
            return InvalidArgument(f"topic {self._topic} does not take the message: {error.str()}")
        if error.code() in _NO_TOPIC:
            return Unavailable(f"there is no topic {self._topic}: create it")
        if error.fatal():
            return Internal(f"producing to {self._topic}: {error.str()}")
        return Unavailable(f"producing to {self._topic}: {error.str()}")

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._producer.poll(_POLL_S)
        # Nobody waits for what is left; it is sent again after a restart.
        self._producer.purge()
        self._producer.poll(0)

    def _on_loop(self, act: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(act, *args)
        except RuntimeError:
            pass


def _answered(partitions: Sequence[Any]) -> Sequence[Any]:
    """`partitions`, when the broker has answered for each of them."""
    for each in partitions:
        if each.error is not None:
            raise KafkaException(each.error)
    return partitions


def _consumed(consumer: Any, limit: int) -> list[Any]:
    """What there is, at most `limit`, once there is something. (`consume` alone waits until it has all of them.)"""
    first = consumer.poll(_POLL_S)
    return [] if first is None else [first, *consumer.consume(limit - 1, 0)] if limit > 1 else [first]


_headers_of = methodcaller("headers")
# Not consumed.headers(): for a name that is no UTF-8 the library returns holes, with an error beside them that CPython
# does not look for where it has called often. To touch a hole ends the process.


def _headers(consumed: Any) -> tuple[tuple[str, bytes], ...]:
    try:
        return tuple((name, value or b"") for name, value in _headers_of(consumed) or ())
    except (SystemError, UnicodeDecodeError) as err:
        # A name is no UTF-8, and the library gives none then. Without them the message does not hold up its partition.
        log.warning("the headers of %s/%s cannot be read: %s", consumed.partition(), consumed.offset(), err)
        return ()


def _resolve(future: asyncio.Future[list[Message]], messages: list[Message]) -> None:
    if not future.done():
        future.set_result(messages)


def _answer(future: asyncio.Future[None], error: ShoalError | None) -> None:
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
    log.error("%s", doing, exc_info=error)
    return Internal(f"{doing}: an unexpected error; the log has the cause")
