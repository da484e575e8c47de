"""SetRetention, ListRetention, ApplyRetention over the wire; who may have them applied; what an ingest is told."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from mesh.election import LEADER, Election
from mesh.etcd import Etcd
from mesh.mongo import connect
from services.ingest.dispatch.remote import RemoteResults
from services.ingest.job import End, Outcome
from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import EtcdProcess, until
from tests.store.conftest import Store, refused, running_store
from tests.store.test_result_rpc import BAD, get, put, result

pytestmark = pytest.mark.mongo

RESULTS, ANSWERS = pb.RetentionRule.COLLECTION_RESULTS, pb.RetentionRule.COLLECTION_ANSWERS
PRECONDITION = StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def etcd_process(tmp_path: Path) -> AsyncIterator[EtcdProcess]:
    folder = tmp_path / "etcd"
    folder.mkdir()
    with EtcdProcess(folder) as process:
        await process.until_ready()
        yield process


@pytest.fixture
async def led(config: StoreConfig, etcd_process: EtcdProcess) -> AsyncIterator[Store]:
    """A store beside an etcd."""
    async with running_store(config.model_copy(update={"etcd": etcd_process.address, "notice_ms": 0})) as running:
        yield running


async def rules(store: Store) -> list[pb.RetentionRule]:
    found = list((await store.stub.ListRetention(pb.ListRetentionRequest())).rules)
    for rule in found:
        assert rule.HasField("updated_at")
        rule.ClearField("updated_at")
    return found


def rule(collection: int, keep_s: int | None = None, tenant: str | None = None) -> pb.RetentionRule:
    keep = None if keep_s is None else Duration(seconds=keep_s)
    return pb.RetentionRule(collection=collection, keep=keep, tenant=tenant)


async def put_rule(store: Store, of: pb.RetentionRule, *, remove: bool = False) -> pb.SetRetentionResponse:
    return await store.stub.SetRetention(pb.SetRetentionRequest(rule=of, remove=remove))


def apply(store: Store, token: int):
    return store.stub.ApplyRetention(pb.ApplyRetentionRequest(token=token))


async def aged(config: StoreConfig, *jobs: str) -> None:
    """Makes the results of these jobs a year old."""
    async with connect(config.mongo) as client:
        year = datetime.now(UTC) - timedelta(days=365)
        found = client[config.database].results
        await found.update_many({"_id": {"$in": list(jobs)}}, {"$set": {"recorded_at": year}})


async def test_rules_are_set_listed_and_removed(store: Store) -> None:
    assert await rules(store) == []
    await put_rule(store, rule(RESULTS, 3600))
    await put_rule(store, rule(RESULTS, None, ""))
    answer = await put_rule(store, rule(ANSWERS, 60, "a"))
    assert len(answer.rules) == 3
    assert await rules(store) == [rule(ANSWERS, 60, "a"), rule(RESULTS, 3600), rule(RESULTS, None, "")]
    await put_rule(store, rule(RESULTS, 7200))
    await put_rule(store, rule(RESULTS, None, ""), remove=True)
    await put_rule(store, rule(ANSWERS, None, "nobody's"), remove=True)
    assert await rules(store) == [rule(ANSWERS, 60, "a"), rule(RESULTS, 7200)]


async def test_hostile_rules_are_named_and_change_nothing(store: Store) -> None:
    await put_rule(store, rule(RESULTS, 3600))
    for wrong, word in [
        (pb.RetentionRule(), "collection"),
        (rule(77), "collection"),
        (rule(RESULTS, 1), "60 s"),
        (rule(RESULTS, -5), "keep"),
        (rule(RESULTS, 1 << 62), "keep"),
        (rule(RESULTS, 60, "t" * 1_025), "tenant"),
        (rule(pb.RetentionRule.COLLECTION_TOMBSTONES, 60), "86400 s"),
        (rule(pb.RetentionRule.COLLECTION_TOMBSTONES, 90_000, "t"), "tombstones"),
    ]:
        await refused(put_rule(store, wrong), BAD, "rule", word)
    assert await rules(store) == [rule(RESULTS, 3600)]


async def test_only_the_leader_has_it_applied(led: Store, config: StoreConfig, etcd_process: EtcdProcess) -> None:
    await put(led, result("old"), result("new"))
    await aged(config, "old")
    await put_rule(led, rule(RESULTS, 3600))
    for token in (0, 1, -1, (1 << 63) - 1):
        await refused(apply(led, token), PRECONDITION, "nobody leads")
    async with Etcd(etcd_process.address) as etcd, Election(etcd, LEADER, "local/coord-0") as election:
        await until(lambda: election.is_leader, "it leads")
        token = election.term.token
        for wrong in (0, token - 1, token + 1):
            await refused(apply(led, wrong), PRECONDITION, "not the leader's", "local/coord-0")
        assert (await get(led, "old")).job_id == "old"
        answer = await apply(led, token)
        assert (answer.results, answer.more) == (1, False)
    await refused(apply(led, token), PRECONDITION, "nobody leads")
    await refused(get(led, "old"), StatusCode.NOT_FOUND, "removed by retention")
    await get(led, "new")


async def test_an_etcd_that_lost_its_data_has_leaders_again(
    led: Store, config: StoreConfig, etcd_process: EtcdProcess, tmp_path: Path
) -> None:
    await put_rule(led, rule(RESULTS, 3600))
    tokens, removed = [], 0
    for at in ("first", "second"):
        await put(led, result(at))
        await aged(config, at)
        async with Etcd(etcd_process.address) as etcd, Election(etcd, LEADER, "local/coord-0") as election:
            for n in range(5 if at == "first" else 0):  # The first etcd has seen more: its tokens are greater.
                await etcd.put(b"/other", str(n).encode())
            await until(lambda: election.is_leader, "it leads")
            tokens.append(election.term.token)
            removed += (await apply(led, tokens[-1])).results
        if at == "first":
            etcd_process.kill()
            shutil.rmtree(next(path for path in (tmp_path / "etcd").rglob("member")).parent)
            etcd_process.start()
            await etcd_process.until_ready()
    assert (removed, len(tokens)) == (2, 2)


async def test_etcd_is_away(led: Store, etcd_process: EtcdProcess) -> None:
    etcd_process.kill()
    await refused(apply(led, 5), StatusCode.UNAVAILABLE)


async def test_a_store_that_stands_alone_has_no_leader(store: Store) -> None:
    await refused(apply(store, 1), PRECONDITION, "SHOAL_STORE_ETCD")


async def test_what_ingest_asks_before_it_runs_a_job_again(
    led: Store, config: StoreConfig, etcd_process: EtcdProcess
) -> None:
    """A job in somebody's hands when its result went: ingest is told that it has ended, and how."""
    await put(led, result("done"), result("failed", pb.Result.OUTCOME_FAILED, code=3, generation=2))
    await aged(config, "done", "failed")
    await put_rule(led, rule(RESULTS, 60))
    async with Etcd(etcd_process.address) as etcd, Election(etcd, LEADER, "local/coord-0") as election:
        await until(lambda: election.is_leader, "it leads")
        assert (await apply(led, election.term.token)).results == 2
    ingest = RemoteResults(led.channel)
    standing = await ingest.standing(["done", "failed", "none"])
    assert {job: (end.outcome, end.code, end.generation) for job, end in standing.items()} == {
        "done": (Outcome.SUCCEEDED, 0, 1),
        "failed": (Outcome.FAILED, 3, 2),
    }
    (ended,) = await ingest.put([result("done", pb.Result.OUTCOME_CANCELLED, code=1)], [""])
    assert ended == End(Outcome.SUCCEEDED, 0, ended.message)
    await refused(
        led.stub.QueryResults(pb.QueryResultsRequest(include_removed=True)), BAD, "include_removed", "job_ids"
    )
