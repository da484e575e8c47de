"""Schedules through real processes: each time is one job, whoever leads and whoever is killed."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from pymongo import AsyncMongoClient, UpdateOne

from services.ingest.schedules.documents import SCHEDULES
from services.ingest.schedules.schedule import label_of
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, submit
from tests.long_form import by_form

S = grpc.StatusCode
EVERY_SECOND = "* * * * * *"
YEARLY = "0 0 1 1 *"
# The third one kills both instances.
KILLS = by_form(3, 5)


def schedule(**fields: Any) -> pb.Schedule:
    made: dict[str, Any] = {"name": f"s{uuid.uuid4().hex[:12]}", "cron": EVERY_SECOND, "job": submit(), **fields}
    return pb.Schedule(**made)


async def put(client: Client, wanted: pb.Schedule, *, replace: bool = False) -> pb.Schedule:
    request = pb.PutScheduleRequest(schedule=wanted, replace=replace)
    answer: pb.PutScheduleResponse = await client.stub.PutSchedule(request, timeout=20)
    return answer.schedule


async def get(client: Client, name: str, tenant: str = "") -> pb.Schedule:
    answer = await client.stub.GetSchedule(pb.GetScheduleRequest(name=name, tenant=tenant), timeout=20)
    found: pb.Schedule = answer.schedule
    return found


async def remove(client: Client, name: str, tenant: str = "") -> None:
    await client.stub.RemoveSchedule(pb.RemoveScheduleRequest(name=name, tenant=tenant), timeout=20)


async def jobs_of(client: Client, tenant: str) -> list[pb.Job]:
    found: list[pb.Job] = []
    token = ""
    while True:
        request = pb.ListJobsRequest(tenant=tenant, page_size=1_000, page_token=token)
        answer = await client.stub.ListJobs(request, timeout=20)
        found += answer.jobs
        token = answer.next_page_token
        if not token:
            return found[::-1]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_each_time_becomes_a_job(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    made = await put(client, schedule(tenant=tenant, job=submit(data=b"again", labels={"a": "b"})))
    assert len(made.upcoming) == 5
    assert made.time_zone == "UTC"

    async def three_have_ended() -> bool:
        jobs = await jobs_of(client, tenant)
        return [job.state for job in jobs].count(pb.JOB_STATE_SUCCEEDED) >= 3

    await until(three_have_ended, "three jobs")
    await remove(client, made.name, tenant)
    jobs = await jobs_of(client, tenant)
    times = [job.labels["scheduled_for"] for job in jobs]
    assert len(set(times)) == len(times)
    for job, time in zip(jobs, times, strict=True):
        assert job.idempotency_key == f"schedule:{made.name}:{time}"
        assert dict(job.labels) == {"a": "b", "schedule": made.name, "scheduled_for": time}
        assert job.submitted_at.ToDatetime(UTC) >= datetime.fromisoformat(time)
    assert list(mesh.store.results[jobs[0].id].response.raw_output_contents) == [b"again"]


async def test_a_time_whose_job_was_made_by_another_version_of_the_schedule_has_that_job(
    client: Client, mesh: FakeMesh, mongo_uri: str, shared_database: str
) -> None:
    wanted, now = schedule(tenant=uuid.uuid4().hex), datetime.now(UTC)
    keys = [f"schedule:{wanted.name}:{label_of(now + timedelta(seconds=ahead))}" for ahead in range(90)]
    earlier = [submit(data=b"as it was", tenant=wanted.tenant, idempotency_key=f"{n}") for n in range(len(keys))]
    made = await asyncio.gather(*(client.stub.Submit(one, timeout=20) for one in earlier))
    ids = {answer.job.id for answer in made}
    keyed = [
        UpdateOne({"_id": answer.job.id}, {"$set": {"key": key}}) for answer, key in zip(made, keys, strict=True)
    ]  # No client may.
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        await mongo[shared_database]["jobs"].bulk_write(keyed)
    await put(client, wanted)

    async def has_fired() -> bool:
        return (await get(client, wanted.name, wanted.tenant)).fired > 0

    await until(has_fired, "a time has its job")
    assert (await get(client, wanted.name, wanted.tenant)).last_job_id in ids
    await remove(client, wanted.name, wanted.tenant)


async def test_history_pause_and_resume(client: Client, mesh: FakeMesh) -> None:
    made = await put(client, schedule())

    async def has_fired() -> bool:
        return (await get(client, made.name)).fired >= 1

    await until(has_fired, "a job")
    request = pb.PauseScheduleRequest(name=made.name)
    paused = (await client.stub.PauseSchedule(request, timeout=20)).schedule
    assert paused.paused
    assert not paused.upcoming
    assert paused.last_job_id
    before = (await get(client, made.name)).fired
    await put(client, schedule(name=made.name, cron=YEARLY, paused=True), replace=True)
    changed = await get(client, made.name)
    assert (changed.cron, changed.paused, changed.fired) == (YEARLY, True, before)
    request.resume = True
    resumed = (await client.stub.PauseSchedule(request, timeout=20)).schedule
    assert not resumed.paused
    assert len(resumed.upcoming) == 5
    assert resumed.upcoming[0].ToDatetime(UTC) > datetime.now(UTC)
    await remove(client, made.name)
    assert (await refused(get(client, made.name)))[0] is S.NOT_FOUND


async def hanging(request: Any, context: Any) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("policy", [pb.OVERLAP_POLICY_SKIP, pb.OVERLAP_POLICY_CANCEL])
async def test_overlaps(client: Client, mesh: FakeMesh, policy: pb.OverlapPolicy) -> None:
    mesh.infer.model = hanging
    tenant = uuid.uuid4().hex
    made = await put(client, schedule(tenant=tenant, overlap=policy))

    async def three_times_came() -> bool:
        now = await get(client, made.name, tenant)
        return (now.skipped if policy == pb.OVERLAP_POLICY_SKIP else now.fired) >= 3

    await until(three_times_came, "three times")
    await remove(client, made.name, tenant)
    jobs = await jobs_of(client, tenant)
    if policy == pb.OVERLAP_POLICY_SKIP:
        assert len(jobs) == 1
    else:
        assert {job.state for job in jobs[:-1]} == {pb.JOB_STATE_CANCELLED}
        assert jobs[0].transitions[-1].reason == f"cancelled: schedule {made.name} has its next time"
    mesh.infer.model = echo
    await client.stub.CancelJob(pb.CancelJobRequest(id=jobs[-1].id), timeout=20)


@pytest.mark.parametrize(
    ("misfire", "fired"),
    [(pb.MISFIRE_POLICY_SKIP, 0), (pb.MISFIRE_POLICY_LATEST, 1), (pb.MISFIRE_POLICY_ALL, 3)],
)
async def test_missed_times(
    client: Client,
    mesh: FakeMesh,
    mongo_uri: str,
    shared_database: str,
    misfire: pb.MisfirePolicy,
    fired: int,
) -> None:
    tenant = uuid.uuid4().hex
    # Daily, far from now: no time comes due while the test runs.
    hour = (datetime.now(UTC) + timedelta(hours=12)).hour
    made = await put(client, schedule(tenant=tenant, cron=f"30 {hour} * * *", misfire=misfire))
    # As if nobody had been there for three days.
    missed = made.upcoming[0].ToDatetime(UTC) - timedelta(days=3)
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        await mongo[shared_database][SCHEDULES].update_one({"name": made.name}, {"$set": {"next_at": missed}})

    async def went_on() -> bool:
        return (await get(client, made.name, tenant)).upcoming[0] == made.upcoming[0]

    await until(went_on, "the schedule goes on")
    jobs = await jobs_of(client, tenant)
    assert len(jobs) == fired
    now = await get(client, made.name, tenant)
    assert (now.fired, now.skipped) == (fired, 1 if misfire != pb.MISFIRE_POLICY_ALL else 0)
    if misfire != pb.MISFIRE_POLICY_ALL:
        assert now.last_skip.startswith("no leader ran")
    await remove(client, made.name, tenant)


async def test_lists_are_by_tenant_and_name(client: Client) -> None:
    tenant = uuid.uuid4().hex
    for name in ("b", "a", "c"):
        await put(client, schedule(tenant=tenant, name=name, cron=YEARLY))
    await put(client, schedule(tenant=tenant + "x", name="a", cron=YEARLY))
    found = (await client.stub.ListSchedules(pb.ListSchedulesRequest(tenant=tenant), timeout=20)).schedules
    assert [one.name for one in found] == ["a", "b", "c"]
    assert not any(one.HasField("job") for one in found)
    every = (await client.stub.ListSchedules(pb.ListSchedulesRequest(), timeout=20)).schedules
    assert len(every) >= 4
    for name in ("a", "b", "c"):
        await remove(client, name, tenant)
    await remove(client, "a", tenant + "x")


async def test_a_name_is_taken_once(client: Client) -> None:
    wanted = schedule(cron=YEARLY)
    await put(client, wanted)
    code, said = await refused(put(client, wanted))
    assert code is S.ALREADY_EXISTS
    assert "exists already" in said
    answers = await asyncio.gather(*(put(client, wanted, replace=True) for _ in range(5)), return_exceptions=True)
    assert not [one for one in answers if isinstance(one, Exception) and S.ABORTED is not getattr(one, "code", int)()]
    await remove(client, wanted.name)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "name: 1 to 64 letters"),
        ({"name": "a/b"}, "name: 1 to 64 letters"),
        ({"name": "x" * 100_000}, "name: 1 to 64 letters"),
        ({"cron": "nonsense"}, "cron: 'nonsense'"),
        ({"time_zone": "Nowhere"}, "time_zone: no zone 'Nowhere'"),
        ({"misfire": 9}, "misfire: there is no policy 9"),
        ({"overlap": 9}, "overlap: there is no policy 9"),
        ({"job": None}, "job: required"),
        ({"job": pb.SubmitRequest()}, "job.request: required"),
        ({"job": submit(idempotency_key="k")}, "job.idempotency_key: must be unset in a recurring job"),
        ({"job": submit(delay=Duration())}, "job.delay: must be unset in a recurring job"),
        ({"job": submit(depends_on=[pb.Dependency(job_id="x")])}, "job.depends_on: must be unset in a recurring job"),
        ({"job": submit(tenant="other")}, "job.tenant: expected the schedule's own"),
        ({"job": submit(labels={str(n): "" for n in range(63)})}, "job.labels: at most 62, got 63"),
        ({"job": submit(data=b"x" * (1 << 20))}, "job: at most 1048576 bytes"),
        ({"job": submit(retry=pb.RetryPolicy(max_attempts=-1))}, "job.retry.max_attempts"),
        ({"tenant": "t" * 65}, "job.tenant: at most 64"),
    ],
    ids=range(17),
)
async def test_what_makes_no_sense_is_refused(client: Client, fields: dict[str, Any], says: str) -> None:
    wanted = schedule()
    for name, value in fields.items():
        if value is None:
            wanted.ClearField(name)  # type: ignore[arg-type]
        elif isinstance(value, pb.SubmitRequest):
            wanted.job.CopyFrom(value)
        else:
            setattr(wanted, name, value)
    code, said = await refused(put(client, wanted))
    assert (code, said[: len(says)]) == (S.INVALID_ARGUMENT, says)


async def kill_in_turn(ingests: list[IngestProcess], fired: Any) -> None:
    for kill in range(KILLS):
        before = await fired()

        async def some_more(seen: int = before) -> bool:
            return bool(await fired() >= seen + 2)

        await until(some_more, "two more times", within_s=60)
        for victim in ingests if kill == 2 else [ingests[kill % 2]]:
            victim.kill()
            victim.start()


@pytest.mark.timeout(240)
async def test_kills_of_leaders_neither_lose_nor_double_a_time(
    own_mesh: FakeMesh, start_ingest: StartIngest, mongo_uri: str, mongo_database: str
) -> None:
    ingests = [start_ingest(n, lease_ms=2_000, renew_ms=500) for n in range(2)]
    for ingest in ingests:
        await ingest.until_ready()
    client = Client(ingests[0].address)
    made = await put(client, schedule(tenant="t", misfire=pb.MISFIRE_POLICY_ALL))
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        schedules = mongo[mongo_database][SCHEDULES]

        async def fired() -> int:
            return int((await schedules.find_one({"name": made.name}) or {})["fired"])

        await kill_in_turn(ingests, fired)
    for ingest in ingests:
        await ingest.until_ready()
    await remove(client, made.name, "t")
    jobs = await jobs_of(client, "t")
    times = sorted(datetime.fromisoformat(job.labels["scheduled_for"]) for job in jobs)
    assert len(times) >= 2 * KILLS
    assert times == [times[0] + timedelta(seconds=n) for n in range(len(times))]
    for job in jobs:
        assert (await client.ended(job.id, within_s=60)).state == pb.JOB_STATE_SUCCEEDED
    await client.channel.close()
