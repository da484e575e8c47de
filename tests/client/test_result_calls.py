"""`client.results` against a server that answers, breaks off and refuses as a test tells it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.client import Client, Outcome, ResultFilter, methods
from shoal.client.result import to_filter, to_query
from shoal.errors import InvalidArgument, NotFound
from shoal.store.v1 import store_pb2 as pb
from tests.client.served import Served

OK = pb.Result.OUTCOME_SUCCEEDED


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served().start()
    yield server
    server.close()


def stored(job_id: str, **fields: Any) -> pb.Result:
    return pb.Result(job_id=job_id, **{"outcome": OK, "model_name": "m", **fields})


def test_a_result_with_its_answer(served: Served) -> None:
    async def get(request: pb.GetResultRequest, context: Any) -> pb.GetResultResponse:
        if request.job_id != "j":
            await context.abort(grpc.StatusCode.NOT_FOUND, "job x: no result (yet)")
        found = stored("j", labels={"a": "b"}, batch_id="b1", tenant="t", attempt=2)
        found.recorded_at.FromDatetime(datetime(2026, 11, 24, tzinfo=UTC))
        found.response.outputs.add(name="y", datatype="FP32", shape=[2])
        found.response.raw_output_contents.append(np.float32([1, 2]).tobytes())
        return pb.GetResultResponse(result=found)

    served.on(methods.GET_RESULT, get)
    with Client(served.address) as client:
        result = client.results.get("j")
        with pytest.raises(NotFound, match="no result"):
            client.results.get("x")
    assert (result.outcome, result.labels, result.batch_id) == (Outcome.SUCCEEDED, {"a": "b"}, "b1")
    assert result.recorded_at == datetime(2026, 11, 24, tzinfo=UTC)
    assert result.answer is not None
    assert result.answer.outputs["y"].tolist() == [1, 2]


def test_a_list_of_more_than_a_page(served: Served) -> None:
    asked: list[pb.QueryResultsRequest] = []

    async def query(request: pb.QueryResultsRequest, context: Any) -> pb.QueryResultsResponse:
        asked.append(request)
        first = int(request.page_token or 0)
        last = min(first + request.page_size, 1_500)
        found = [stored(f"j{n}") for n in range(first, last)]
        return pb.QueryResultsResponse(results=found, next_page_token=str(last) if last < 1_500 else "")

    served.on(methods.QUERY_RESULTS, query)
    with Client(served.address, tenant="mine") as client:
        found = client.results.list(ResultFilter(labels={"k": "v"}, outcome="failed"), limit=1_200)
        assert [one.job_id for one in found] == [f"j{n}" for n in range(1_200)]
        assert len(client.results.list(limit=9_999)) == 1_500
    assert [(one.page_size, one.page_token, one.tenant) for one in asked[:2]] == [
        (1000, "", "mine"),
        (200, "1000", "mine"),
    ]
    assert (dict(asked[0].labels), asked[0].outcome) == ({"k": "v"}, pb.Result.OUTCOME_FAILED)
    assert asked[0].omit_response


def test_a_stream_goes_on_where_it_broke(served: Served) -> None:
    """It breaks after each message, in each way there is; every result comes once."""
    opened: list[str] = []

    async def stream(request: pb.StreamResultsRequest, context: Any) -> Any:
        opened.append(request.cursor)
        at = int(request.cursor or 0)
        yield pb.StreamResultsResponse(cursor=str(at))
        yield pb.StreamResultsResponse(
            results=[stored(f"j{n}") for n in range(at, at + 3)], cursor=str(at + 3), complete=at >= 27
        )
        if len(opened) % 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")

    served.on(methods.STREAM_RESULTS, stream, "unary_stream")
    with Client(served.address) as client:
        found = [one.job_id for one in client.results.stream()]
    assert found == [f"j{n}" for n in range(30)]
    assert opened == ["", *(str(n) for n in range(3, 30, 3))]


def test_a_filter_is_checked_and_translated() -> None:
    with pytest.raises(InvalidArgument, match="use one of succeeded, failed, cancelled, expired"):
        to_filter(ResultFilter(outcome="dead"))
    whole = ResultFilter(
        job_ids=("a", "b"), model="m", version="1", tenant="t", outcome=Outcome.EXPIRED, labels={"k": "v"},
        batch_id="b", since=datetime(2026, 1, 1, tzinfo=UTC), until=datetime(2026, 1, 2, tzinfo=UTC),
    )  # fmt: skip
    message = to_filter(whole)
    assert len(message.ListFields()) == len(pb.ResultFilter.DESCRIPTOR.fields)
    query = to_query(message, page_size=7)
    assert query.page_size == 7
    for descriptor, value in message.ListFields():
        assert getattr(query, descriptor.name) == value
