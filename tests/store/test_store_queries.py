"""No question to MongoDB reads a whole collection: each is explained."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, cast

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from pymongo import monitoring

from mesh import mongo
from services.store.documents import Collections
from services.store.page_token import Position
from services.store.results import result_documents
from services.store.results.read_gate import ReadGate
from services.store.results.result_documents import document
from services.store.results.result_filter import find
from services.store.results.result_stream import ResultStream
from services.store.results.results import Results
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import PATIENCE_S
from tests.long_form import by_form
from tests.store.conftest import running_store, store_config, stored

pytestmark = pytest.mark.mongo

NOW = datetime(2026, 11, 24, tzinfo=UTC)
OK, FAILED = pb.Result.OUTCOME_SUCCEEDED, pb.Result.OUTCOME_FAILED
PLACES = [None, Position(NOW, "j")]
READING = ReadGate().reading("")
# Each field of a filter, left out and given: every combination of them is asked.
CHOICES: dict[str, list[Any]] = {
    "model_name": [None, "m1"],
    "model_version": [None, "1"],
    "tenant": [None, "t2"],
    "outcome": [None, OK, FAILED],
    "since": [None, Timestamp(seconds=1)],
    "until": [None, Timestamp(seconds=253402300799)],
    "labels": [None, {"team": "a"}, {"team": "a", "stage": "1"}],
}


def combinations(**more: list[Any]) -> list[pb.ResultFilter]:
    choices = {**CHOICES, **more}
    given = (zip(choices, values, strict=True) for values in product(*choices.values()))
    return [pb.ResultFilter(**{field: value for field, value in one if value is not None}) for one in given]


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


class Heard(monitoring.CommandListener):
    """Every command that any client of this process sends, once it is told to listen."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, dict[str, Any]]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.commands.append((event.database_name, dict(event.command)))

    def succeeded(self, event: object) -> None: ...

    def failed(self, event: object) -> None: ...

    def client(self, uri: str) -> mongo.Client:
        return mongo.Client(uri, event_listeners=[self], tz_aware=True)


@pytest.fixture
def heard() -> Heard:
    return Heard()


class Connections(monitoring.ConnectionPoolListener):
    """The connections that a client closes."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def connection_closed(self, event: monitoring.ConnectionClosedEvent) -> None:
        self.closed.append(event.reason)

    def pool_created(self, event: object) -> None: ...

    def pool_ready(self, event: object) -> None: ...

    def pool_cleared(self, event: object) -> None: ...

    def pool_closed(self, event: object) -> None: ...

    def connection_created(self, event: object) -> None: ...

    def connection_ready(self, event: object) -> None: ...

    def connection_check_out_started(self, event: object) -> None: ...

    def connection_check_out_failed(self, event: object) -> None: ...

    def connection_checked_out(self, event: object) -> None: ...

    def connection_checked_in(self, event: object) -> None: ...


@pytest.mark.parametrize("call", ["search", "get"])
async def test_calls_that_are_cancelled_keep_their_connections(
    call: str, thousand: Collections, mongo_uri: str, mongo_database: str
) -> None:
    heard, connections = Heard(), Connections()
    async with mongo.Client(mongo_uri, event_listeners=[heard, connections], tz_aware=True) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        heard.commands.clear()
        results = Results(collections, cast(Any, None), lambda: NOW)
        nothing = pb.ResultFilter(tenant="t1", model_name="m1", labels={"team": "c"})

        def begun() -> asyncio.Task[Any]:
            if call == "get":
                return asyncio.create_task(results.get("none"))
            return asyncio.create_task(results.page(nothing, None, 100, READING))

        for count in range(1, 21):
            task = begun()
            async with asyncio.timeout(PATIENCE_S):
                while len([name for name, command in heard.commands if "find" in command]) < count:
                    assert not task.done()
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert results.searches.held == 0
        assert connections.closed == []


async def test_pages_at_once_take_turns_with_other_work(thousand: Collections, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(thousand, cast(Any, None), lambda: NOW)
    order: list[str] = []
    monkeypatch.setattr(result_documents, "result", lambda doc: (order.append("d"), pb.Result(job_id=doc["_id"]))[1])

    async def bystander() -> None:
        while True:
            order.append(" ")
            await asyncio.sleep(0)

    other = asyncio.create_task(bystander())
    async with asyncio.timeout(PATIENCE_S):
        pages = await asyncio.gather(*(results.query(pb.QueryResultsRequest(page_size=1_000)) for _ in range(5)))
    other.cancel()
    assert [len(found) for found, _ in pages] == [1_000] * 5
    # One page's 16, and the first 16 of one that begins.
    assert max(map(len, "".join(order).split())) <= 32


SESSION = ("lsid", "txnNumber", "startTransaction", "autocommit", "$db", "$clusterTime", "writeConcern")


def bare(command: dict[str, Any]) -> dict[str, Any]:
    """A command as it can be explained."""
    return {key: value for key, value in command.items() if key not in (*SESSION, "readConcern", "maxTimeMS")}


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        await collections.build_later_indexes()
        yield collections


@pytest.mark.parametrize(
    ("place", "oldest_first"),
    by_form([(PLACES[0], True), (PLACES[1], False)], [*product(PLACES, [False, True])]),
)
async def test_every_combination_of_filters_uses_an_index_and_no_sort(
    collections: Collections, place: Position | None, oldest_first: bool
) -> None:
    asked = combinations()
    assert len(asked) == 288
    for wanted in asked:
        plan = await find(collections, wanted, place, oldest_first=oldest_first).explain()
        seen = set(stages(plan["queryPlanner"]["winningPlan"]))
        assert "IXSCAN" in seen, wanted
        assert not seen & {"COLLSCAN", "SORT"}, wanted


def recorded(n: int) -> dict[str, Any]:
    """One of a thousand: 4 models in 2 versions, 5 tenants, a tenth failed, a seventh labelled."""
    of = pb.Result(
        job_id=f"j{n:04}",
        outcome=FAILED if n % 10 == 0 else OK,
        model_name=f"m{n % 4}",
        model_version=str(n % 2 + 1),
        tenant=f"t{n % 5}",
        labels={"team": "ab"[n % 2], "stage": str(n % 3)} if n % 7 == 0 else {},
    )
    return document(of, NOW + timedelta(milliseconds=n // 10), b"x" * 100)


@pytest.fixture
async def thousand(collections: Collections) -> Collections:
    await collections.results.insert_many([recorded(n) for n in range(1_000)])
    return collections


async def test_only_answers_are_read(thousand: Collections) -> None:
    """What does not match is passed over in the index: its document, response and all, is never read."""
    for wanted in combinations(labels=[None]):
        plan = await find(thousand, wanted).explain()
        assert plan["executionStats"]["totalDocsExamined"] == plan["executionStats"]["nReturned"], wanted


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (pb.ResultFilter(), "by_time"),
        (pb.ResultFilter(tenant="t1"), "by_tenant"),
        (pb.ResultFilter(model_name="m1"), "by_model"),
        (pb.ResultFilter(outcome=pb.Result.OUTCOME_EXPIRED), "by_failure"),
        (pb.ResultFilter(labels={"team": "nobody"}), "by_label"),
        (pb.ResultFilter(tenant="t1", labels={"team": "nobody"}), "by_label"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_narrow_filter_uses_its_own_index(thousand: Collections, wanted: pb.ResultFilter, index: str) -> None:
    plan = await find(thousand, wanted).explain()
    assert f"'{index}'" in str(plan["queryPlanner"]["winningPlan"])


async def test_answers_are_those_that_match(thousand: Collections) -> None:
    """The question to MongoDB against a plain reading of the filter, for every combination."""
    docs = [recorded(n) for n in range(1_000)]
    results = Results(thousand, cast(Any, None), lambda: NOW)
    for wanted in combinations(job_ids=[None, ["j0000", "j0042", "j0043", "j0777", "none"]]):
        page, end = await results.page(wanted, None, 1_000, READING, omit_response=True)
        expected = [doc["_id"] for doc in reversed(docs) if matches(doc, wanted)]
        assert ([doc["_id"] for doc in page], end) == (expected, None), wanted


@pytest.fixture
async def listened(thousand: Collections, heard: Heard, mongo_uri: str, mongo_database: str) -> AsyncIterator[Results]:
    """Results whose queries are heard, and which examine seven of a tenant at a time: each query takes too long."""
    async with heard.client(mongo_uri) as client:
        made = Collections(client[mongo_database])
        await made.prepare()
        heard.commands.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("services.store.results.results._TRIES", ((1e-9, None), (None, 7)))
            yield Results(made, cast(Any, None), lambda: NOW)


@pytest.mark.parametrize(
    "wanted",
    [
        pb.ResultFilter(),
        pb.ResultFilter(tenant="t3", model_name="m2"),
        pb.ResultFilter(tenant="t3", labels={"team": "a", "stage": "1"}),
        pb.ResultFilter(tenant="t3", labels={"none": "such"}),
        pb.ResultFilter(
            model_version="2", outcome=FAILED, until=Timestamp(seconds=int(NOW.timestamp()), nanos=50_000_000)
        ),
    ],
)
async def test_a_search_goes_on_page_by_page_and_examines_a_bounded_number(
    listened: Results, heard: Heard, wanted: pb.ResultFilter
) -> None:
    expected = [f"j{n:04}" for n in range(1_000) if matches(recorded(n), wanted) and is_before(recorded(n), wanted)]
    for oldest_first in (False, True):
        found, sizes, end = [], set(), None
        while True:
            page, end = await listened.page(wanted, end, 5, READING, oldest_first=oldest_first, omit_response=True)
            found += [doc["_id"] for doc in page]
            sizes.add(len(page))
            if end is None:
                break
        assert found == (expected if oldest_first else expected[::-1])
        assert max(sizes) <= 5
    finds = [command for _, command in heard.commands if "find" in command]
    # Of the first pages; the others are alike.
    for command in finds[:9]:
        plan = await listened._collections.db.command("explain", bare(command), verbosity="executionStats")
        stats = plan["executionStats"]
        if "skip" in command:
            assert (stats["totalKeysExamined"] <= 7, stats["totalDocsExamined"]) == (True, 0)
        else:
            # Up to 13 of a span, and those that were recorded in the same milliseconds as its first and its last one.
            assert stats["totalDocsExamined"] <= 13 + 2 * 9


async def test_a_stream_of_a_search_is_whole(listened: Results) -> None:
    watch: Any = None
    stream = ResultStream(listened, watch, 1)
    for labels, count in (({"team": "a"}, 14), ({"none": "such"}, 0)):
        request = pb.StreamResultsRequest(filter=pb.ResultFilter(tenant="t3", labels=labels), omit_response=True)
        pages = [page async for page in stream.follow(request)]
        assert [page.complete for page in pages] == [False] * (len(pages) - 1) + [True]
        assert sum(len(page.results) for page in pages) == count


async def test_the_searches_of_a_tenant_delay_no_query_of_another(thousand: Collections) -> None:
    results = Results(thousand, cast(Any, None), lambda: NOW)
    labels = {"team": "a", "stage": "1"}
    async with contextlib.AsyncExitStack() as running, asyncio.timeout(PATIENCE_S):
        for _ in range(2):
            await running.enter_async_context(results.searches.take("t1"))
        waiting = asyncio.create_task(results.page(pb.ResultFilter(tenant="t1", labels=labels), None, 9, READING))
        for wanted in (pb.ResultFilter(tenant="t2", labels=labels), pb.ResultFilter(tenant="t1")):
            docs, _ = await results.page(wanted, None, 9, READING)
            assert docs
        assert not waiting.done()
        await running.aclose()
        docs, _ = await waiting
        assert docs


def is_before(doc: dict[str, Any], wanted: pb.ResultFilter) -> bool:
    return not wanted.HasField("until") or doc["recorded_at"] < wanted.until.ToDatetime(tzinfo=UTC)


def matches(doc: dict[str, Any], wanted: pb.ResultFilter) -> bool:
    labels = {label["key"]: label["value"] for label in doc.get("labels", ())}
    return (
        all(getattr(wanted, f) in (0, "", doc.get(f)) for f in ("model_name", "model_version", "tenant", "outcome"))
        and (not wanted.job_ids or doc["_id"] in wanted.job_ids)
        and all(labels.get(key) == value for key, value in wanted.labels.items())
    )


async def test_questions_with_job_ids_read_no_more_than_those(
    thousand: Collections, heard: Heard, mongo_uri: str, mongo_database: str
) -> None:
    async with heard.client(mongo_uri) as client:
        listened = Collections(client[mongo_database])
        await listened.prepare()
        heard.commands.clear()
        results = Results(listened, cast(Any, None), lambda: NOW)
        await results.page(
            pb.ResultFilter(job_ids=["j0001", "j0002"], tenant="t1", labels={"a": "b"}), None, 9, READING
        )
        await results.page(pb.ResultFilter(job_ids=["j0001", "j0002"]), PLACES[1], 9, READING, oldest_first=True)
    found = [command for _, command in heard.commands if "find" in command]
    assert len(found) >= 3
    for command in found:
        assert not command.get("sort")
        plan = await thousand.db.command("explain", bare(command), verbosity="executionStats")
        assert "COLLSCAN" not in set(stages(plan["queryPlanner"]["winningPlan"]))
        assert plan["executionStats"]["totalDocsExamined"] <= 2


async def test_indexes_of_an_older_store_go(collections: Collections) -> None:
    results = collections.results
    await results.create_index([("tenant", 1), ("recorded_at", -1), ("_id", -1)], name="tenant_newest")
    await collections.prepare()
    await collections.build_later_indexes()
    names = {*await results.index_information()}
    assert "tenant_newest" not in names
    assert names >= {"by_time", "by_model", "by_tenant", "by_failure", "by_label", "removed"}
    await collections.prepare()


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
            plan = await client[name].command("explain", bare(command), verbosity="queryPlanner")
            assert "COLLSCAN" not in set(stages(plan)), command
            explained += 1
    assert explained > 20
