"""Batches against an ingest that answers as a test wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

import shoal
from shoal.client import AsyncClient, BatchState
from shoal.client.jobs.batch import to_url
from shoal.client.transport import methods
from shoal.client.transport.retry import RetryPolicy
from shoal.errors import InvalidArgument, NotFound
from shoal.ingest.v1 import ingest_pb2 as ingest
from tests.client.served import Served

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001, longest_wait_s=0.01)


def client_of(served: Served, **options: Any) -> AsyncClient:
    return AsyncClient(served.address, retry=QUICK, **options)


class Batches:
    """Batches by idempotency key; the first `lost` answers get lost."""

    def __init__(self, served: Served) -> None:
        self.requests: dict[str, ingest.SubmitBatchRequest] = {}
        self.lost = 0
        self.told = [
            ingest.Batch(id="b", state=ingest.BATCH_STATE_RUNNING, rows=10, rows_ok=4),
            ingest.Batch(id="b", state=ingest.BATCH_STATE_SUCCEEDED, rows=10, rows_ok=9, rows_failed=1),
        ]
        served.on(methods.SUBMIT_BATCH, self.submit)
        served.on(methods.WATCH_BATCH, self.watch, "unary_stream")

    async def submit(self, request: Any, context: Any) -> Any:
        existed = request.idempotency_key in self.requests
        self.requests[request.idempotency_key] = request
        if self.lost:
            self.lost -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
        return ingest.SubmitBatchResponse(batch=ingest.Batch(id="b", state=1), existed=existed)

    async def watch(self, request: Any, context: Any) -> Any:
        for batch in self.told:
            yield ingest.WatchBatchResponse(batch=batch)
            if self.lost:
                self.lost -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")


@pytest.fixture
def batches(served: Served) -> Batches:
    return Batches(served)


async def test_a_submit_is_repeated_under_one_key(served: Served, batches: Batches) -> None:
    batches.lost = 2
    served.start()
    async with client_of(served, tenant="t") as client:
        batch = await client.batches.submit(
            "m",
            ["s3://b/in/", "s3://b/x.parquet"],
            "s3://b/out/",
            format="parquet",
            columns={"x": "features"},
            keep=["id"],
            text_outputs=["label"],
            version=3,
            labels={"a": "b"},
            chunk_rows=7,
            max_attempts=2,
        )
    assert (batch.id, batch.state) == ("b", BatchState.RUNNING)
    (request,) = batches.requests.values()
    request.idempotency_key = ""
    assert request == ingest.SubmitBatchRequest(
        inputs=["s3://b/in/", "s3://b/x.parquet"],
        output="s3://b/out/",
        model_name="m",
        model_version="3",
        format=ingest.BATCH_FORMAT_PARQUET,
        columns={"x": "features"},
        keep_columns=["id"],
        text_outputs=["label"],
        tenant="t",
        labels={"a": "b"},
        chunk_rows=7,
        max_attempts=2,
    )


async def test_a_watch_goes_on_where_its_stream_broke(served: Served, batches: Batches) -> None:
    batches.lost = 2
    served.start()
    async with client_of(served) as client:
        assert [batch.state async for batch in client.batches.watch("b")][-1] is BatchState.SUCCEEDED
        ended = await client.batches.wait("b")
    assert (ended.rows_done, ended.rows_failed, ended.ended) == (10, 1, True)


async def test_what_is_wrong_is_said_before_anything_is_sent(served: Served, batches: Batches) -> None:
    served.start()
    async with client_of(served) as client:
        with pytest.raises(InvalidArgument, match="format 'csv': use one of jsonl, parquet, npz, objects"):
            await client.batches.submit("m", "s3://b/x", "s3://b/y", format="csv")
        with pytest.raises(InvalidArgument, match="state 'unknown': use one of running"):
            await client.batches.list(state="unknown")
    assert not batches.requests


async def test_pages_are_read_until_there_are_enough(served: Served) -> None:
    async def page(request: Any, context: Any) -> Any:
        first = int(request.page_token or 0)
        batches = [ingest.Batch(id=str(first + n), state=1) for n in range(2)]
        return ingest.ListBatchesResponse(batches=batches, next_page_token=str(first + 2) if first < 6 else "")

    served.on(methods.LIST_BATCHES, page)
    served.start()
    async with client_of(served) as client:
        assert [batch.id for batch in await client.batches.list(limit=5)] == list("01234")
        assert len(await client.batches.list(limit=50)) == 8


def test_the_blocking_face(served: Served, batches: Batches) -> None:
    async def missing(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no batch 'x'")

    served.on(methods.GET_BATCH, missing)
    served.start()
    with shoal.Client(served.address, retry=QUICK) as client:
        assert client.batches.submit("m", "s3://b/x", "s3://b/y").id == "b"
        assert [batch.rows_ok for batch in client.batches.watch("b")] == [4, 9]
        with pytest.raises(NotFound):
            client.batches.get("x")


def test_paths_become_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert to_url("s3://b/k") == "s3://b/k"
    assert to_url("a b.jsonl") == f"{tmp_path.as_uri()}/a%20b.jsonl"
    assert to_url("folder") == to_url("folder/") == f"{tmp_path.as_uri()}/folder/"
    assert to_url(tmp_path / "new/") == f"{tmp_path.as_uri()}/new"
    assert to_url("new/") == f"{tmp_path.as_uri()}/new/"


def test_states_of_a_newer_node_are_unknown() -> None:
    from shoal.client.jobs.batch import of_batch

    batch = of_batch(ingest.Batch(state=77, format=88))  # type: ignore[arg-type]
    assert (batch.state, batch.ended) == (BatchState.UNKNOWN, False)
