"""WatchJobs over the wire: what is told, what narrows it, what is refused, and what kills do not lose."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import grpc
import pytest
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection

from mesh import log_reads
from mesh.mongo import Document
from services.ingest import job_scan
from services.ingest.documents import JOBS as COLLECTION
from services.ingest.documents import document_of
from services.ingest.queries import watch_many as module
from services.ingest.queries.filters import checked
from services.ingest.queries.watch_many import WatchMany, WatchUpdate
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import PATIENCE_S, until
from tests.change_logs import Answers, Log
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, failing, reached
from tests.ingest.making import job
from tests.long_form import by_form

S = grpc.StatusCode
NOWHERE = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
JOBS = 80
KILLS = by_form(2, 4)


class Watcher:
    """A watch of one client."""

    def __init__(self, client: Client, **wanted: Any) -> None:
        self.client = client
        self.wanted = wanted
        self.token = ""

    async def stand(self) -> Watcher:
        request = pb.WatchJobsRequest(resume_token=self.token, **self.wanted)
        self.call = self.client.stub.WatchJobs(request, timeout=120)
        first = await self.call.read()
        assert not first.HasField("job")
        self.token = first.resume_token
        return self

    async def next(self) -> pb.WatchJobsResponse:
        while True:
            answer: pb.WatchJobsResponse = await self.call.read()
            self.token = answer.resume_token
            if answer.HasField("job"):
                return answer

    async def told(self, many: int) -> list[tuple[str, int]]:
        answers = [await self.next() for _ in range(many)]
        return [(answer.job.id, answer.job.state) for answer in answers]


async def refusal(client: Client, **wanted: Any) -> tuple[grpc.StatusCode, str]:
    call = client.stub.WatchJobs(pb.WatchJobsRequest(**wanted), timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value.code(), caught.value.details() or ""


def life(job_id: str) -> list[tuple[str, int]]:
    return [(job_id, state) for state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING, pb.JOB_STATE_SUCCEEDED)]


async def test_a_filter_of_jobs_is_told_from_now_on(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    before = await client.ended((await client.submit(tenant=tenant)).job.id)
    watch = await Watcher(client, tenant=tenant).stand()
    await client.ended((await client.submit(tenant="another")).job.id)
    job = await client.ended((await client.submit(tenant=tenant, data=b"x" * 1_000)).job.id)
    assert await watch.told(3) == life(job.id)
    watch.call.cancel()
    assert before.id != job.id


async def test_a_watch_goes_on_after_its_token(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    await reached(client)
    watch = await Watcher(client, tenant=tenant).stand()
    first = await client.ended((await client.submit(tenant=tenant)).job.id)
    assert await watch.told(1) == life(first.id)[:1]
    watch.call.cancel()
    await watch.stand()
    assert await watch.told(1) == life(first.id)[1:2]
    watch.call.cancel()
    second = await client.ended((await client.submit(tenant=tenant)).job.id)
    await watch.stand()
    assert await watch.told(4) == [life(first.id)[2], *life(second.id)]
    watch.call.cancel()


async def test_what_narrows_a_watch(client: Client, mesh: FakeMesh) -> None:
    async def model(request: Any, context: Any) -> Any:
        if request.model_name == "broken":
            await failing(context, S.INVALID_ARGUMENT)
        return await echo(request, context)

    mesh.infer.model = model
    mark = uuid.uuid4().hex
    failed = await Watcher(client, labels={"mark": mark}, states=[pb.JOB_STATE_FAILED]).stand()
    broken = await Watcher(client, labels={"mark": mark, "n": "1"}, model_name="broken").stand()
    made = [
        (await client.submit(model=model_name, labels={"mark": mark, "n": n})).job.id
        for n in "01"
        for model_name in ("echo", "broken")
    ]
    for job_id in made:
        await client.ended(job_id)
    assert await failed.told(2) == [(made[1], pb.JOB_STATE_FAILED), (made[3], pb.JOB_STATE_FAILED)]
    assert {job_id for job_id, _ in await broken.told(3)} == {made[3]}
    by_id = await Watcher(client, ids=made[:2], include_existing=True).stand()
    assert [(answer.existing, answer.job.id) for answer in [await by_id.next(), await by_id.next()]] == [
        (True, made[0]),
        (True, made[1]),
    ]
    for watch in (failed, broken, by_id):
        watch.call.cancel()


async def test_existing_jobs_come_first(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    there = [(await client.submit(tenant=tenant)).job.id for _ in range(5)]
    for job_id in there:
        await client.ended(job_id)
    watch = await Watcher(client, tenant=tenant, include_existing=True).stand()
    assert await watch.told(2) == [(job_id, pb.JOB_STATE_SUCCEEDED) for job_id in there[:2]]
    watch.call.cancel()
    late = await client.ended((await client.submit(tenant=tenant, model="later")).job.id)
    await watch.stand()
    told = await watch.told(6 + 1)
    assert told[:3] == [(job_id, pb.JOB_STATE_SUCCEEDED) for job_id in there[2:]]
    assert told[3][0] == late.id
    watch.call.cancel()


async def test_existing_jobs_with_a_label_are_found_in_parts_of_the_tenants(
    jobs: AsyncCollection[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_scan, "SCANNED_MOST", 10)
    made = [job(tenant="t", labels=(("k", "v"),) if n in (0, 35) else ()) for n in range(40)]
    await jobs.insert_many([document_of(one) for one in made])
    filter_ = checked((), frozenset(), "", "t", {"k": "v"})
    told: list[str] = []
    token = ""
    # Each token goes on where it was, also one between two jobs that match.
    for _ in range(5):
        async with aclosing(WatchMany(jobs, 9).follow(filter_, existing=True, token=token)) as updates:
            await anext(updates)
            update = await anext(updates)
            token = update.token
            if update.job is not None:
                assert update.is_existing
                told.append(update.job.id)
    assert told == [made[0].id, made[35].id]


async def test_a_watch_begins_while_jobs_change(jobs: AsyncCollection[Document]) -> None:
    is_over = False

    async def change() -> None:
        while not is_over:
            await jobs.insert_many([document_of(job(tenant="busy")) for _ in range(20)])

    changing = [asyncio.create_task(change()) for _ in range(2)]
    try:
        filter_ = checked((), frozenset(), "", "busy", {})
        watch = WatchMany(jobs, 9)
        for _ in range(100):
            async with aclosing(watch.follow(filter_, existing=False, token="")) as updates:
                first = await anext(updates)
                assert first.token
                assert first.job is None
    finally:
        is_over = True
        await asyncio.gather(*changing)


async def test_what_makes_no_sense_is_refused(client: Client, mesh: FakeMesh) -> None:
    watch = await Watcher(client, tenant="t").stand()
    watch.call.cancel()
    for wanted, says in (
        ({"ids": ["x"]}, "ids[0]: not a job's id: 'x'"),
        ({"ids": [NOWHERE] * 1_001}, "ids: at most 1000, got 1001"),
        ({"states": [99]}, "state: not a job state: 99"),
        ({"tenant": "t" * 1_000_000}, "tenant: too long"),
        ({"labels": {"k": "v" * 10_000}}, "labels['k']: too long"),
        ({"labels": {str(n): "" for n in range(65)}}, "labels: at most 64, got 65"),
        ({"labels": {"k": "v"}, "include_existing": True}, "labels: existing jobs are not found by labels alone"),
        ({"resume_token": "nonsense"}, "resume_token: not a token of this service"),
        ({"resume_token": "A" * 1_000_000}, "resume_token: not a token of this service"),
        ({"resume_token": watch.token}, "resume_token: it belongs to another filter"),
        ({"tenant": "t", "resume_token": watch.token[:-8]}, "resume_token: not a token of this service"),
    ):
        code, said = await refusal(client, **wanted)
        assert (code, said[: len(says)]) == (S.INVALID_ARGUMENT, says)


async def test_watches_are_bounded_and_given_back(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    ingest = start_ingest(max_filter_watches=2)
    await ingest.until_ready()
    client = Client(ingest.address)
    watches = [await Watcher(client).stand() for _ in range(2)]
    assert (await refusal(client))[0] is S.RESOURCE_EXHAUSTED
    watches[0].call.cancel()

    async def is_room() -> bool:
        try:
            await Watcher(client).stand()
        except grpc.aio.AioRpcError:
            return False
        return True

    await until(is_room, "room for a watch")
    await client.channel.close()


async def collect(clients: list[Client], tenant: str, told: defaultdict[str, list[int]]) -> None:
    """Watches on, with whichever instance answers."""
    token = ""
    for turn in range(10_000):
        client = clients[turn % len(clients)]
        call = client.stub.WatchJobs(pb.WatchJobsRequest(tenant=tenant, resume_token=token), timeout=120)
        try:
            async with aclosing(call.__aiter__()) as answers:  # type: ignore[type-var]
                async for answer in answers:
                    token = answer.resume_token
                    if answer.HasField("job"):
                        told[answer.job.id].append(len(answer.job.transitions))
        except grpc.aio.AioRpcError as err:
            if err.code() not in (S.UNAVAILABLE, S.CANCELLED):
                raise
            await asyncio.sleep(0.05)


@pytest.mark.timeout(240)
async def test_kills_of_those_who_tell_lose_nothing(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    async def slow(request: Any, context: Any) -> Any:
        await asyncio.sleep(0.02)
        return await echo(request, context)

    own_mesh.infer.model = slow
    ingests = [start_ingest(n, lease_ms=2_000, renew_ms=500) for n in range(2)]
    clients = [Client(ingest.address) for ingest in ingests]
    for ingest in ingests:
        await ingest.until_ready()
    told: defaultdict[str, list[int]] = defaultdict(list)
    watching = asyncio.create_task(collect(clients, "watched", told))
    made: list[str] = []

    async def is_told() -> bool:
        assert not watching.done(), watching.exception()
        made.append((await clients[0].submit(tenant="watched")).job.id)
        return bool(told)

    await until(is_told, "the watch stands")
    for kill in range(KILLS):
        for n in range(JOBS // KILLS):
            made.append((await clients[n % 2].submit(tenant="watched")).job.id)
        ingests[kill % 2].kill()
        ingests[kill % 2].start()
        await ingests[kill % 2].until_ready()
    jobs = [await clients[0].ended(job_id, within_s=60) for job_id in made]
    complete = {job.id: list(range(1, len(job.transitions) + 1)) for job in jobs}
    late = [job_id for job_id in complete if told.get(job_id, [0])[0] > 1]  # Made before the watch stood.
    for job_id in late:
        del complete[job_id]
    await until(
        lambda: all(told.get(job_id, [])[-1:] == steps[-1:] for job_id, steps in complete.items()), "all told", 60
    )
    assert {job_id: told[job_id] for job_id in complete} == complete
    assert len(complete) >= JOBS
    watching.cancel()
    for client in clients:
        await client.channel.close()


async def test_an_answer_of_mongodb_has_few_changes_however_many_there_are(
    jobs: AsyncCollection[Document], mongo_uri: str, mongo_database: str
) -> None:
    answers, made = Answers(), [job(tenant="t") for _ in range(50)]
    client: AsyncMongoClient[Document]
    async with AsyncMongoClient(mongo_uri, event_listeners=[answers], tz_aware=True) as client:
        watch = WatchMany(client[mongo_database][COLLECTION], 1)
        filter_ = checked((), frozenset(), "", "t", {})
        async with aclosing(watch.follow(filter_, existing=False, token="")) as updates:
            token = (await anext(updates)).token
            await jobs.insert_many([document_of(one) for one in made])
        async with aclosing(watch.follow(filter_, existing=False, token=token)) as updates:
            await anext(updates)
            told = [update.job.id async for update in first(updates, 50) if update.job is not None]
    assert told == [one.id for one in made]
    assert 1 < max(answers.changes) <= 8


async def first(updates: AsyncIterator[WatchUpdate], count: int) -> AsyncIterator[WatchUpdate]:
    for _ in range(count):
        yield await anext(updates)


async def test_watches_of_large_jobs_take_turns_with_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    large, order = job(labels=(("k", "v" * 5_000),)), list[str]()

    async def updates(*given: object) -> AsyncIterator[WatchUpdate]:
        for _ in range(30):
            order.append("w")
            yield WatchUpdate("", large)

    watches = WatchMany(cast(Any, None), 3)
    monkeypatch.setattr(watches, "_updates", updates)

    async def follow() -> None:
        async for _ in watches.follow(checked((), frozenset(), "", "", {}), existing=False, token=""):
            pass

    async def bystander() -> None:
        while True:
            order.append(" ")
            await asyncio.sleep(0)

    other = asyncio.create_task(bystander())
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(follow() for _ in range(3)))
    other.cancel()
    assert order.count("w") == 90
    # At most the first one of each.
    assert max(map(len, "".join(order).split())) <= 3


async def test_watches_that_are_behind_take_turns_and_those_that_are_not_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log()
    watches = WatchMany(cast(Any, log), 100)
    monkeypatch.setattr(log_reads, "_NOTICED_S", 3_600.0)

    async def follow(tenant: str) -> None:
        filter_ = checked((), frozenset(), "", tenant, {})
        token = module._token(module.StreamPosition({"_data": "82"}), filter_)
        async for _ in watches.follow(filter_, existing=False, token=token):
            pass

    many = [asyncio.create_task(follow("many")) for _ in range(20)]
    await until(lambda: len(log.behind) == log_reads.AT_ONCE // 2, "they read the log")
    other = asyncio.create_task(follow("other"))
    await until(lambda: "other" in log.behind, "the other tenant's reads the log")
    assert log.behind.count("many") == log_reads.AT_ONCE // 2
    # MongoDB reads on for a client that has just left, so its place stays taken.
    many[0].cancel()
    await until(lambda: log.left == ["many"], "it has left")
    await asyncio.sleep(0)
    assert log.behind.count("many") == log_reads.AT_ONCE // 2
    log.may_end.set()
    await until(lambda: log.live == 20, "all but the one that has left wait for changes")
    many[0].cancel()
    for task in (*many, other):
        task.cancel()
    await asyncio.wait([*many, other], timeout=PATIENCE_S)
