"""MongoDB away at the start, killed, frozen, or with a log that has moved on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure

from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.mongods import MongoProcess
from tests.store.conftest import Store, refused, running_store, serving, sha256, store_config

pytestmark = pytest.mark.mongo

# Against a store that hangs: a call without an answer fails the test, not the whole run.
LIMIT_S = 60

_CAPPED_POSITION_LOST = 136  # MongoDB's code


def config_of(mongod: MongoProcess, run_dir: Path, tmp_path: Path) -> StoreConfig:
    return store_config(mongod.uri, "shoal", run_dir / "store-0.sock", tmp_path / "blobs")


async def put_result(store: Store, job: str) -> None:
    result = pb.Result(job_id=job, outcome=pb.Result.OUTCOME_FAILED)
    await store.stub.PutResults(pb.PutResultsRequest(results=[result]), timeout=LIMIT_S)


async def register(store: Store, name: str) -> None:
    await store.put(b"model")
    model = pb.ModelVersion(name=name, version=1, files=[pb.ModelFile(path="m", sha256=sha256(b"model"))])
    await store.stub.RegisterModel(pb.RegisterModelRequest(model=model), timeout=LIMIT_S)


def every_call(store: Store) -> dict[str, object]:
    stub, job = store.stub, pb.Result(job_id="j", outcome=pb.Result.OUTCOME_FAILED)
    digest = sha256(b"model")
    model = pb.ModelVersion(name="m", version=1, files=[pb.ModelFile(path="m", sha256=digest)])
    return {
        "PutArtifact": store.put(b"model"),
        "StatArtifact": stub.StatArtifact(pb.StatArtifactRequest(sha256=digest), timeout=LIMIT_S),
        "GetArtifact": stub.GetArtifact(pb.GetArtifactRequest(sha256=digest), timeout=LIMIT_S),
        "RegisterModel": stub.RegisterModel(pb.RegisterModelRequest(model=model), timeout=LIMIT_S),
        "ListModels": stub.ListModels(pb.ListModelsRequest(), timeout=LIMIT_S),
        "RemoveModel": stub.RemoveModel(pb.RemoveModelRequest(name="m"), timeout=LIMIT_S),
        "SetAlias": stub.SetAlias(pb.SetAliasRequest(name="m", alias="a", version=1), timeout=LIMIT_S),
        "SetAlias 0": stub.SetAlias(pb.SetAliasRequest(name="m", alias="a"), timeout=LIMIT_S),
        "WatchModels": stub.WatchModels(pb.WatchModelsRequest(), timeout=LIMIT_S),
        "PutResults": stub.PutResults(pb.PutResultsRequest(results=[job]), timeout=LIMIT_S),
        "GetResult": stub.GetResult(pb.GetResultRequest(job_id="j"), timeout=LIMIT_S),
        "QueryResults": stub.QueryResults(pb.QueryResultsRequest(), timeout=LIMIT_S),
        "WatchResults": stub.WatchResults(pb.WatchResultsRequest(), timeout=LIMIT_S),
    }


async def all_unavailable(store: Store, word: str) -> None:
    calls = every_call(store)
    await asyncio.gather(*(refused(call, StatusCode.UNAVAILABLE, word) for call in calls.values()))


async def test_mongodb_away_at_the_start(run_dir: Path, tmp_path: Path) -> None:
    mongod = MongoProcess(tmp_path)
    async with running_store(config_of(mongod, run_dir, tmp_path), wait=False) as store:
        await store.channel.channel_ready()
        assert not await serving(store.channel)
        await all_unavailable(store, "retry")
        with mongod:
            await mongod.until_ready()
            await until(lambda: serving(store.channel), "the store serves")
            await register(store, "m")
            await put_result(store, "j")


@pytest.fixture
async def mongod(tmp_path: Path) -> AsyncIterator[MongoProcess]:
    with MongoProcess(tmp_path) as mongod:
        await mongod.until_ready()
        yield mongod


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_mongodb_away_later(mongod: MongoProcess, run_dir: Path, tmp_path: Path, how: str) -> None:
    async with running_store(config_of(mongod, run_dir, tmp_path)) as store:
        await register(store, "before")
        models = store.stub.WatchModels(pb.WatchModelsRequest(), timeout=4 * LIMIT_S)
        assert [model.name for model in (await models.read()).snapshot] == ["before"]
        results = store.stub.WatchResults(pb.WatchResultsRequest(), timeout=4 * LIMIT_S)
        token = (await results.read()).resume_token

        mongod.kill() if how == "killed" else mongod.freeze()
        await all_unavailable(store, "MongoDB")
        # A watch of results ends, and says so; its token goes on from there.
        await refused(results, StatusCode.UNAVAILABLE, "MongoDB")
        mongod.start() if how == "killed" else mongod.thaw()
        await mongod.until_ready()

        await until(lambda: _works(put_result(store, "after")), "results are recorded again")
        results = store.stub.WatchResults(pb.WatchResultsRequest(resume_token=token), timeout=LIMIT_S)
        await results.read()
        # Written while MongoDB was frozen, or after: in either case after the token.
        jobs = {(await results.read()).result.job_id}
        while "after" not in jobs:
            jobs.add((await results.read()).result.job_id)
        # The watch of the registry has lived through it all.
        await until(lambda: _works(register(store, "after")), "models are registered again")
        names: list[str] = []
        while "after" not in names:
            names = [model.name for model in (await models.read()).snapshot]


async def _works(call: object) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError as err:
        if err.code() != StatusCode.UNAVAILABLE:
            raise
        return False
    return True


async def test_a_resume_token_that_is_too_old(tmp_path: Path, run_dir: Path) -> None:
    # A log of a few MiB, cut whenever MongoDB makes a checkpoint: each second instead of each minute.
    with MongoProcess(tmp_path, "--syncdelay", "1", oplog_mib=1) as mongod:
        await mongod.until_ready()
        config = config_of(mongod, run_dir, tmp_path)
        async with running_store(config) as store, AsyncMongoClient(mongod.uri) as client:
            call = store.stub.WatchResults(pb.WatchResultsRequest(), timeout=LIMIT_S)
            token = (await call.read()).resume_token
            call.cancel()

            async def rolled() -> bool:
                await client.noise.noise.insert_many([{"noise": os.urandom(1 << 20)} for _ in range(10)])
                try:
                    first = await client.local["oplog.rs"].find_one(sort=[("$natural", 1)])
                except OperationFailure as err:
                    if err.code != _CAPPED_POSITION_LOST:  # The log was cut where it was being read: look again.
                        raise
                    return False
                return first["o"].get("msg") != "initiating set"

            await until(rolled, "the log has moved on")
            again = store.stub.WatchResults(pb.WatchResultsRequest(resume_token=token), timeout=LIMIT_S)
            await refused(again, StatusCode.OUT_OF_RANGE, "resume_token", "watch anew")
