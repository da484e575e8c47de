"""Kafka: members that come and go, topics that are not there, messages that are too large, a broker that hangs."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest

from services.ingest.connectors.kafka import KafkaSink, KafkaSource
from services.ingest.connectors.message import Message, Outgoing
from shoal.errors import InvalidArgument, Unavailable
from tests.breakable import until
from tests.ingest.connectors.brokers import message, number
from tests.ingest.connectors.conftest import StartConnector
from tests.ingest.connectors.kafkas import FAST, Kafka, Tansu
from tests.ingest.connectors.test_connector_contract import PATIENT, answered, mirror, settled
from tests.ingest.faults import FakeMesh

pytestmark = [pytest.mark.timeout(240)]


def source_of(kafka: Kafka, start: str = "earliest", **options: str) -> KafkaSource:
    table = kafka.table["source"]
    fast = {name: str(value) for name, value in FAST.items()}
    return KafkaSource(table["brokers"], table["topic"], table["group"], start=start, options={**fast, **options})


def partitions(source: KafkaSource) -> list[tuple[str, int | None]]:
    """Where each lane is, and how far behind."""
    return [(partition.committed, partition.lag) for partition in source.status().partitions]


@asynccontextmanager
async def shard_reader(source: KafkaSource, into: list[Message], *, settles: bool = True) -> AsyncIterator[None]:
    """Reads beside the block, and settles what it reads."""

    async def read() -> None:
        while True:
            for each in await source.receive(100):
                into.append(each)
                if settles:
                    source.settle(each)

    async with source:
        task = asyncio.create_task(read())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_members_share_the_partitions_and_one_goes_on_where_the_other_stopped(kafka: Kafka) -> None:
    one: list[Message] = []
    two: list[Message] = []
    first, second = source_of(kafka), source_of(kafka)
    async with shard_reader(first, one):
        await kafka.publish([b"%d" % n for n in range(10)])
        await until(lambda: len(one) == 10, "all", **PATIENT)
        async with shard_reader(second, two):
            await until(
                lambda: len(first.status().partitions) == len(second.status().partitions) == 1, "a share", **PATIENT
            )
            await kafka.publish([b"%d" % n for n in range(10, 20)])
            await until(lambda: len(one) + len(two) >= 20, "all", **PATIENT)
        await until(lambda: len(first.status().partitions) == 2, "both again", **PATIENT)
        await kafka.publish([b"%d" % n for n in range(20, 30)])
        await until(lambda: len(one) + len(two) >= 30, "all", **PATIENT)
    assert sorted(int(each.value) for each in (*one, *two)) == list(range(30)), "each once: all was committed in time"


async def test_what_a_member_had_not_settled_is_lost_to_it_and_goes_to_the_next(kafka: Kafka) -> None:
    one: list[Message] = []
    await kafka.publish([b"%d" % n for n in range(10)])
    async with shard_reader(source_of(kafka), one, settles=False):
        await until(lambda: len(one) == 10, "all", **PATIENT)
    await until(lambda: all(each.partition.is_revoked for each in one), "the loss")
    assert await kafka.committed() == [0, 0]
    two: list[Message] = []
    async with shard_reader(source_of(kafka), two):
        await until(lambda: len(two) == 10, "all of it again", **PATIENT)
    assert {each.location for each in one} == {each.location for each in two}
    assert await kafka.committed() == [5, 5]


async def test_who_goes_on_where_all_is_answered_is_not_behind(kafka: Kafka) -> None:
    for n in range(3):  # One by one: Tansu knows the end of a topic only by its last batch.
        await kafka.publish([b"%d" % n, b"%d" % n])
    for _ in range(2):
        source = source_of(kafka)
        async with shard_reader(source, []):
            await until(lambda at=source: partitions(at) == [("3", 0)] * 2, "no lag", **PATIENT)


async def test_what_waits_is_counted_before_anything_is_answered(kafka: Kafka) -> None:
    for n in range(3):
        await kafka.publish([b"%d" % n, b"%d" % n])
    source = source_of(kafka)
    async with shard_reader(source, [], settles=False):
        await until(lambda: partitions(source) == [("", 3)] * 2, "the lag", **PATIENT)


async def test_from_latest_who_goes_on_before_anything_was_settled_passes_nothing_over(kafka: Kafka) -> None:
    await kafka.publish([b"old", b"old"])
    one: list[Message] = []
    first = source_of(kafka, "latest")
    async with shard_reader(first, one, settles=False):
        await until(lambda: partitions(first) == [("1", 0)] * 2, "its place", **PATIENT)
        await kafka.publish([b"taken"])  # Of the first partition only.
        await until(lambda: bool(one), "the message", **PATIENT)
    await kafka.publish([b"meanwhile", b"meanwhile"])
    two: list[Message] = []
    async with shard_reader(source_of(kafka, "latest"), two):
        await until(lambda: len(two) >= 3, "what was not answered", **PATIENT)
    assert sorted(each.value for each in two) == [b"meanwhile", b"meanwhile", b"taken"]


async def test_a_broker_that_is_back_is_not_said_to_be_away(tmp_path: Path) -> None:
    with Tansu(tmp_path) as broker:
        broker.wait_until_ready()
        kafka = await Kafka(broker.address).make()
        await kafka.publish([b"0", b"1"])
        # It stays a member, and no message comes any more: nothing else shows that the broker is back.
        source = source_of(kafka, **{"socket.timeout.ms": "1000", "session.timeout.ms": "12000"})
        async with shard_reader(source, []):
            await until(lambda: partitions(source) == [("1", 0)] * 2, "its place", **PATIENT)
            broker.freeze()
            await until(lambda: "Kafka" in source.status().problem, "the trouble", **PATIENT)
            broker.thaw()
            await until(lambda: source.status().problem == "", "all is well", **PATIENT)
            await until(lambda: partitions(source) == [("1", 0)] * 2, "its place", **PATIENT)


async def test_what_came_while_nobody_asked_is_there_when_somebody_does(kafka: Kafka) -> None:
    async with source_of(kafka) as source:
        await kafka.publish([b"first", b"first"])
        got = [*await source.receive(1)]
        source.settle(got[0])
        await until(lambda: source.is_paused, "the partitions are paused", **PATIENT)
        # One by one: Tansu knows the end of a partition only by its last batch.
        for n in range(10):
            await kafka.publish([b"%d" % n] * 2)
        # One message is settled; the end of each partition is read although nothing is fetched.
        await until(lambda: source.status().lag == 21, "the lag of paused partitions", **PATIENT)
        while len(got) < 22:
            got += await asyncio.wait_for(source.receive(5), 60)
        assert not any(each.partition.is_revoked for each in got)
    assert len({each.location for each in got}) == 22


async def test_options_that_kafka_does_not_have_are_named(kafka: Kafka) -> None:
    with pytest.raises(InvalidArgument, match=r"Kafka does not take these options.*no\.such\.option"):
        async with source_of(kafka, **{"no.such.option": "1"}):
            pass


async def test_a_broker_that_is_not_there_is_said_so() -> None:
    options = {
        "socket.connection.setup.timeout.ms": "1000",
        "message.timeout.ms": "1000",
        "delivery.timeout.ms": "1000",
    }
    async with KafkaSink("127.0.0.1:1", "t", options=options) as sink:
        with pytest.raises(Unavailable, match="producing to t"):
            await sink.send(Outgoing(b"x"))
    source = KafkaSource("127.0.0.1:1", "t", "g", start="earliest", options={})
    async with source:
        await until(lambda: "Kafka" in source.status().problem, "the trouble", **PATIENT)


@pytest.mark.mongo
@pytest.mark.parametrize("most", [None, 1_000], ids=["dead-letter-whole", "dead-letter-omitted"])
async def test_an_answer_that_the_sink_will_never_take_is_a_dead_letter(
    kafka: Kafka, start_connector: StartConnector, own_mesh: FakeMesh, most: int | None
) -> None:
    async def grows(request: Any, context: Any) -> Any:
        response = await mirror(request, context)
        if request.id == "1":
            response.outputs[0].name = "y" * 5_000
        return response

    own_mesh.infer.model = grows
    kafka.table["sink"]["options"] = {"message.max.bytes": 3_000}
    if most is not None:
        kafka.table["dead_letters"]["options"] = {"message.max.bytes": most}
    values = [message(0), message(1, b"d" * 1_500), message(2)]
    await kafka.publish(values)
    start_connector(kafka)
    await answered(kafka, [0, 2])
    await settled(kafka, 3)
    (dead,) = await kafka.dead()
    assert "the answer cannot be sent on" in dead.headers["shoal-message"]
    assert own_mesh.store.results[dead.headers["shoal-job-id"]].outcome == 1, "its result stands in the store"
    if most is None:
        assert dead.value == values[1]
    else:
        assert dead.value == b""
        assert int(dead.headers["shoal-omitted-bytes"]) >= 1_500


@pytest.mark.mongo
async def test_a_broker_that_hangs_is_waited_for(
    tmp_path: Path, start_connector: StartConnector, own_mesh: FakeMesh
) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await go.wait()
        return await mirror(request, context)

    own_mesh.infer.model = waits
    with Tansu(tmp_path) as broker:
        broker.wait_until_ready()
        kafka = await Kafka(broker.address).make()
        await kafka.publish([message(n) for n in range(10)])
        start_connector(kafka)
        await until(lambda: sum(own_mesh.infer.calls.values()) >= 10, "the calls", **PATIENT)
        broker.freeze()
        go.set()
        await until(lambda: len(own_mesh.store.results) == 10, "results", **PATIENT)
        broker.thaw()
        found = await answered(kafka, range(10))
        await settled(kafka, 10)
    assert {number(each) for each in found} == set(range(10))
    assert len(own_mesh.store.results) == 10


async def test_a_topic_that_is_made_later_is_read_then(tansu: Tansu) -> None:
    kafka = Kafka(tansu.address)
    got: list[Message] = []
    source = source_of(kafka)
    async with shard_reader(source, got):
        await until(lambda: "there is no topic" in source.status().problem, "the trouble", **PATIENT)
        await kafka.make()
        await kafka.publish([b"a", b"b"])
        await until(lambda: len(got) == 2, "messages", **PATIENT)
        await until(lambda: source.status().problem == "", "all is well", **PATIENT)


async def test_a_topic_that_is_gone_is_said_so(tmp_path: Path) -> None:
    with Tansu(tmp_path) as broker:
        broker.wait_until_ready()
        kafka = await Kafka(broker.address).make()
        got: list[Message] = []
        source = source_of(kafka)
        async with shard_reader(source, got):
            await kafka.publish([b"a", b"b"])
            await until(lambda: len(got) == 2, "messages", **PATIENT)
            broker.kill()  # It keeps nothing.
            broker.start()
            await until(lambda: "there is no topic" in source.status().problem, "the trouble", **PATIENT)


def librdkafka() -> Any:
    """The library itself: what the Python client does not do, other clients and brokers do."""
    found = next((Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs").glob("librdkafka*"))
    lib = ctypes.CDLL(str(found))
    for returns_a_pointer in (lib.rd_kafka_conf_new, lib.rd_kafka_new, lib.rd_kafka_mock_cluster_new):
        returns_a_pointer.restype = ctypes.c_void_p
    lib.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return lib


def producer_of(lib: Any, brokers: str) -> ctypes.c_void_p:
    text, error = ctypes.c_char_p, ctypes.create_string_buffer(512)
    conf = ctypes.c_void_p(lib.rd_kafka_conf_new())
    assert lib.rd_kafka_conf_set(conf, text(b"bootstrap.servers"), text(brokers.encode()), error, 512) == 0
    return ctypes.c_void_p(lib.rd_kafka_new(0, conf, error, 512))


def publish_raw(brokers: str, topic: str, value: bytes, header: bytes) -> None:
    """With a header whose name is any bytes."""
    lib, text, size = librdkafka(), ctypes.c_char_p, ctypes.c_ssize_t
    producer = producer_of(lib, brokers)
    of_topic, of_value, copied, of_header = (1, text(topic.encode())), (4, text(value), size(len(value))), (7, 2), 9
    arguments = (*of_topic, *of_value, *copied, of_header, text(header), text(b"2"), size(1), 0)
    assert lib.rd_kafka_producev(producer, *arguments) == 0
    assert lib.rd_kafka_flush(producer, 30_000) == 0
    lib.rd_kafka_destroy(producer)


@contextmanager
def mock_cluster() -> Iterator[str]:
    """The address of librdkafka's own broker for tests, which knows offsets that are out of range. (Tansu does not.)"""
    lib = librdkafka()
    owner = producer_of(lib, "127.0.0.1:1")
    cluster = ctypes.c_void_p(lib.rd_kafka_mock_cluster_new(owner, 1))
    yield lib.rd_kafka_mock_cluster_bootstraps(cluster).decode()
    lib.rd_kafka_mock_cluster_destroy(cluster)
    lib.rd_kafka_destroy(owner)


@pytest.mark.parametrize("start", ["earliest", "latest"])
async def test_where_the_committed_place_is_gone_all_that_is_there_is_read(start: str) -> None:
    with mock_cluster() as address:
        kafka = Kafka(address, partitions=1)
        await kafka.publish([b"0", b"1"])
        table = kafka.table["source"]
        member = confluent_kafka.Consumer({"bootstrap.servers": address, "group.id": table["group"]})
        places = [confluent_kafka.TopicPartition(table["topic"], 0, 1_000)]
        await asyncio.to_thread(lambda: member.commit(offsets=places, asynchronous=False))
        member.close()
        got: list[Message] = []
        async with shard_reader(source_of(kafka, start), got):
            await until(lambda: len(got) == 2, "what is there", **PATIENT)
            await kafka.publish([b"2", b"3"])
            await until(lambda: len(got) == 4, "what came later", **PATIENT)
        assert [int(each.value) for each in got] == [0, 1, 2, 3]


async def test_headers_that_cannot_be_read_are_seen_at_once(kafka: Kafka, caplog: pytest.LogCaptureFixture) -> None:
    """And not when a hole among them has been touched, which ends the process."""
    got: list[Message] = []
    table = kafka.table["source"]
    await kafka.publish([b"%d" % n for n in range(200)])  # CPython looks for fewer errors in what it runs often.
    await asyncio.to_thread(publish_raw, table["brokers"], table["topic"], b"odd", b"\xff\xfe")
    async with shard_reader(source_of(kafka), got):
        await until(lambda: len(got) == 201, "all", **PATIENT)
    assert "cannot be read: operator.methodcaller('headers') returned a result with an exception set" in caplog.text


async def test_headers_that_cannot_be_read_hold_nothing_up(kafka: Kafka) -> None:
    got: list[Message] = []
    table = kafka.table["source"]
    await asyncio.to_thread(publish_raw, table["brokers"], table["topic"], b"odd", b"\xff\xfe")
    await kafka.publish([b"next", b"next"], headers=[("a", b"1")])
    async with shard_reader(source_of(kafka), got):
        await until(lambda: len(got) == 3, "all", **PATIENT)
    assert sorted((each.value, each.headers) for each in got) == [(b"next", (("a", b"1"),))] * 2 + [(b"odd", ())]
