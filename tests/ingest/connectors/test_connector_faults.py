"""A connector whose parts fail: it starts anew from what is committed, says why, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mesh.mongo_clock import utc_now
from services.ingest.connectors.connector import Connector
from services.ingest.connectors.connector_spec import ConnectorSpec, Endpoints
from services.ingest.connectors.formats import Format
from services.ingest.connectors.message import Message, Outgoing, Partition, job_key
from services.ingest.connectors.offset_tracker import OffsetTracker
from services.ingest.connectors.progress import ConnectorProgress, Phase, SourceStatus
from services.ingest.intake.intake import Accepted
from services.ingest.job import Job
from services.ingest.queries.completions import Ended
from shoal.errors import AlreadyExists, PermissionDenied, ResourceExhausted, ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.making import job


class Log:
    """A stream of messages with one committed position; what is opened reads on from there."""

    def __init__(self, count: int) -> None:
        self.values = [b'{"x": %d}' % n for n in range(count)]
        self.committed = 0
        self.opened = 0
        self.partitions: list[Partition] = []
        self.fault: Callable[[], None] = lambda: None

    def open(self) -> ShardReader:
        self.opened += 1
        return ShardReader(self)


class ShardReader:
    """The source of one start."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._next = log.committed
        self._partition = Partition("0")
        self._ledger = OffsetTracker()
        log.partitions.append(self._partition)

    async def __aenter__(self) -> ShardReader:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._partition.mark_revoked()

    async def receive(self, limit: int) -> Sequence[Message]:
        self._log.fault()
        while self._next == len(self._log.values):
            await asyncio.sleep(0.01)
        at = self._next
        self._next += 1
        self._ledger.received(at)
        return [Message(self._partition, at, f"log/0/{at}", self._log.values[at])]

    def settle(self, message: Message) -> None:
        self._ledger.settled(message.position)
        self._log.committed = (self._ledger.settled_up_to if self._ledger.settled_up_to is not None else -1) + 1

    def status(self) -> SourceStatus:
        return SourceStatus()


class Box:
    """A sink that keeps what it is sent, unless `fault` raises."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.fault: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Box:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def send(self, message: Outgoing) -> None:
        self.fault()
        self.sent.append(message)


class Jobs:
    """Intake and endings in one: a job has ended when it was submitted, unless `held`."""

    def __init__(self) -> None:
        self.by: dict[str, Job] = {}
        self.fault: Callable[[], None] = lambda: None
        self.free = asyncio.Event()
        self.free.set()
        self.waiting = 0

    async def begin_of_connector(self, submit: pb.SubmitRequest) -> asyncio.Future[Accepted]:
        self.fault()
        existed = submit.idempotency_key in self.by
        labels = tuple(submit.labels.items())
        made = self.by.setdefault(submit.idempotency_key, job(key=submit.idempotency_key, labels=labels))
        future: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        future.set_result(Accepted(made, existed))
        return future

    async def by_key(self, tenant: str, key: str) -> Job | None:
        return self.by.get(key)

    async def until_ended(self, job_id: str, *, is_old: bool = False) -> None:
        self.waiting += 1
        try:
            await self.free.wait()
        finally:
            self.waiting -= 1

    async def result(self, job_id: str) -> Ended:
        return Ended(store_pb2.Result(job_id=job_id, outcome="OUTCOME_SUCCEEDED"))


def times(count: int, error: Exception) -> Callable[[], None]:
    """Raises `error` so many times."""
    left = iter(range(count))

    def fault() -> None:
        if next(left, None) is not None:
            raise error

    return fault


class World:
    """A connector between all of these."""

    def __init__(self, count: int) -> None:
        self.log, self.sink, self.dead, self.jobs = Log(count), Box(), Box(), Jobs()
        self.progress = ConnectorProgress(utc_now)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        ready = asyncio.Event()
        ready.set()
        form = Format("record", "protobuf", "m", inputs={"x": "INT64"})
        spec = ConnectorSpec("c", form, lambda: Endpoints(self.log.open(), self.dead, self.sink), max_in_flight=4)
        async with Connector(spec, self.jobs, self.jobs, ready=ready, progress=self.progress):
            yield

    async def until_all_are_settled(self) -> None:
        await until(lambda: self.log.committed == len(self.log.values), "all settled")
        places = {dict(each.headers)["shoal-source"] for each in (*self.sink.sent, *self.dead.sent)}
        assert len(places) == len(self.log.values), "every message has an answer or a dead letter"
        assert len(self.jobs.by) == len(self.log.values), "and one job"


@pytest.mark.parametrize("where", ["log", "sink", "jobs"])
@pytest.mark.parametrize(
    "error",
    [Unavailable("away"), ResourceExhausted("full", retry_after_ms=1), PermissionDenied("not you"), RuntimeError("?")],
    ids=["away", "full", "not-allowed", "fault-of-ours"],
)
async def test_whatever_fails_for_a_while_loses_nothing(where: str, error: Exception) -> None:
    world = World(12)
    if where == "jobs" and isinstance(error, PermissionDenied):
        error = Unavailable("elsewhere")  # A job that may not be submitted is a dead letter: the next test.
    getattr(world, where).fault = times(3, error)
    async with world.running():
        await world.until_all_are_settled()
    assert not world.dead.sent
    told = str(error) if isinstance(error, ShoalError) else "an unexpected error"
    assert told in world.progress.error
    assert world.progress.in_flight == 0


async def test_a_job_that_may_not_be_is_a_dead_letter_and_no_reason_to_start_anew() -> None:
    world = World(5)
    world.jobs.fault = times(1, PermissionDenied("not you"))
    async with world.running():
        await until(lambda: world.log.committed == 5, "all settled")
    (dead,) = world.dead.sent
    assert dict(dead.headers)["shoal-code"] == b"PERMISSION_DENIED"
    assert world.log.opened == 1
    assert (world.progress.answered, world.progress.dead) == (4, 1)


async def test_a_key_that_was_freed_in_between_is_used_again() -> None:
    world = World(1)
    world.jobs.fault = times(1, AlreadyExists("with another request"))
    async with world.running():
        await world.until_all_are_settled()
    assert not world.dead.sent


async def test_a_key_that_a_client_took_makes_a_dead_letter_and_no_foreign_answer() -> None:
    world = World(2)
    key = job_key("c", Message(Partition("0"), 0, "log/0/0", world.log.values[0]))
    world.jobs.by[key] = job(key=key, labels=(("connector", "c"),))
    async with world.running():
        await until(lambda: world.log.committed == 2, "all settled")
    (dead,) = world.dead.sent
    assert dict(dead.headers)["shoal-code"] == b"ALREADY_EXISTS"
    assert dict(dead.headers)["shoal-source"] == b"log/0/0"
    assert [dict(sent.headers)["shoal-source"] for sent in world.sink.sent] == [b"log/0/1"]


async def test_dead_letters_that_are_away_hold_up_what_is_dead_and_what_comes_after_it() -> None:
    world = World(6)
    world.log.values[2] = b"no JSON"
    is_away = True

    def fault() -> None:
        if is_away:
            raise Unavailable("no such topic")

    world.dead.fault = fault
    async with world.running():
        await until(lambda: len(world.sink.sent) == 5, "the others")
        await until(lambda: world.progress.phase is Phase.WAITING, "the wait")
        assert world.log.committed == 2
        is_away = False
        await until(lambda: world.log.committed == 6, "all settled")
    assert [each.value for each in world.dead.sent] == [b"no JSON"]


async def test_a_lane_that_is_lost_takes_its_tasks_along_and_settles_nothing() -> None:
    world = World(4)
    world.jobs.free.clear()
    async with world.running():
        await until(lambda: world.jobs.waiting == 4, "all under way")
        world.log.partitions[0].mark_revoked()
        await until(lambda: world.jobs.waiting == 0, "nobody waits")
        assert world.progress.in_flight == 0
        world.jobs.free.set()
    assert world.log.committed == 0
    assert not world.sink.sent


async def test_a_connector_stops_at_once_whatever_is_under_way() -> None:
    world = World(4)
    world.jobs.free.clear()
    async with asyncio.timeout(30):
        async with world.running():
            await until(lambda: world.jobs.waiting == 4, "all under way")
    assert world.jobs.waiting == 0


def test_standing_says_what_is_known() -> None:
    from services.ingest.connectors.progress import PartitionProgress

    assert SourceStatus().lag is None
    assert SourceStatus((PartitionProgress("0", "5", 3), PartitionProgress("1", "", None))).lag == 3
    progress: Any = ConnectorProgress(utc_now)
    assert progress.record_error("a")
    assert not progress.record_error("a"), "it is no news"
    progress.done(is_dead=False)
    assert progress.record_error("a"), "it is again"
