"""No question to MongoDB reads a whole collection: each is explained."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from pymongo import monitoring

from mesh import mongo
from services.store.documents import Collections
from services.store.page_token import Place
from services.store.results import results
from shoal.store.v1 import store_pb2 as pb
from tests.store.conftest import running_store, store_config, stored

pytestmark = pytest.mark.mongo

NOW = datetime(2026, 11, 24, tzinfo=UTC)
QUERIES = [
    pb.QueryResultsRequest(),
    pb.QueryResultsRequest(job_ids=["a", "b"]),
    pb.QueryResultsRequest(job_ids=["a", "b"], tenant="t", since=Timestamp(seconds=1)),
    pb.QueryResultsRequest(model_name="m"),
    pb.QueryResultsRequest(model_name="m", model_version="1"),
    pb.QueryResultsRequest(model_version="1"),
    pb.QueryResultsRequest(tenant="t"),
    pb.QueryResultsRequest(tenant="t", model_name="m", outcome=pb.Result.OUTCOME_SUCCEEDED),
    pb.QueryResultsRequest(outcome=pb.Result.OUTCOME_FAILED),
    pb.QueryResultsRequest(outcome=pb.Result.OUTCOME_SUCCEEDED),
    pb.QueryResultsRequest(since=Timestamp(seconds=1), until=Timestamp(seconds=2)),
    pb.QueryResultsRequest(model_name="m", since=Timestamp(seconds=1)),
]


def stages(plan: Any) -> Iterator[str]:
    """Every stage in an explained plan, however deep."""
    if isinstance(plan, dict):
        if "stage" in plan:
            yield plan["stage"]
        for value in plan.values():
            yield from stages(value)
    elif isinstance(plan, list):
        for value in plan:
            yield from stages(value)


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        yield collections


@pytest.mark.parametrize("place", [None, Place(NOW, "j")])
@pytest.mark.parametrize("query", QUERIES, ids=lambda query: str(query).replace("\n", " ") or "all")
async def test_queries_of_results(collections: Collections, query: pb.QueryResultsRequest, place: Place | None) -> None:
    plan = await results.find(collections, query, place).explain()
    seen = set(stages(plan["queryPlanner"]["winningPlan"]))
    assert "IXSCAN" in seen
    assert "COLLSCAN" not in seen
    if not query.job_ids:  # At most 1,000 documents: those are sorted in memory.
        assert "SORT" not in seen


async def test_failures_are_found_by_their_own_index(collections: Collections) -> None:
    plan = await results.find(collections, pb.QueryResultsRequest(outcome=pb.Result.OUTCOME_EXPIRED), None).explain()
    assert "failed_newest" in str(plan["queryPlanner"]["winningPlan"])


class Heard(monitoring.CommandListener):
    """Every command that any client of this process sends, once it is told to listen."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, dict[str, Any]]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.commands.append((event.database_name, dict(event.command)))

    def succeeded(self, event: object) -> None: ...

    def failed(self, event: object) -> None: ...


async def test_every_command_of_every_call(
    mongo_uri: str, mongo_database: str, run_dir: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    real = mongo.Client
    monkeypatch.setattr(mongo, "Client", lambda *a, **k: real(*a, event_listeners=[heard], **k))
    config = store_config(mongo_uri, mongo_database, run_dir / "s.sock", tmp_path / "blobs")
    async with running_store(config) as store:
        heard.commands.clear()
        (digest,) = await stored(store, b"model")
        await store.get(digest)
        model = pb.ModelVersion(name="m", files=[pb.ModelFile(path="m", sha256=digest)])
        for _ in range(2):
            await store.stub.RegisterModel(pb.RegisterModelRequest(model=model))
        model.version = 1
        await store.stub.RegisterModel(pb.RegisterModelRequest(model=model))
        await store.stub.SetAlias(pb.SetAliasRequest(name="m", alias="a", version=1))
        await store.stub.SetAlias(pb.SetAliasRequest(name="m", alias="a"))
        for name in ["", "m"]:
            await store.stub.ListModels(pb.ListModelsRequest(name=name))
        await store.stub.RemoveModel(pb.RemoveModelRequest(name="m", version=1))
        await store.stub.RegisterModel(pb.RegisterModelRequest(model=model))
        await store.stub.RemoveModel(pb.RemoveModelRequest(name="m"))
        result = pb.Result(job_id="j", outcome=pb.Result.OUTCOME_FAILED)
        for _ in range(2):
            await store.stub.PutResults(pb.PutResultsRequest(results=[result]))
        await store.stub.GetResult(pb.GetResultRequest(job_id="j"))
    explained = 0
    async with real(mongo_uri) as client:
        for name, command in heard.commands:
            if name != mongo_database or next(iter(command)) not in ("find", "update", "delete", "findAndModify"):
                continue
            session = ("lsid", "txnNumber", "startTransaction", "autocommit", "$db", "$clusterTime", "writeConcern")
            bare = {key: value for key, value in command.items() if key not in (*session, "readConcern", "maxTimeMS")}
            plan = await client[name].command("explain", bare, verbosity="queryPlanner")
            assert "COLLSCAN" not in set(stages(plan)), bare
            explained += 1
    assert explained > 20
