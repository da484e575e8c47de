"""`client.results` against a server that answers, breaks off and refuses as a test tells it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.client import Client, Outcome, ResultFilter
from shoal.client.store.result import to_filter, to_query
from shoal.client.transport import methods
from shoal.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from shoal.store.v1 import store_pb2 as pb
from tests.client.served import Served

OK = pb.Result.OUTCOME_SUCCEEDED


@pytest.fixture
def served(transport: str) -> Iterator[Served]:
    server = Served().start()
    yield server
    server.close()


def stored(job_id: str, **fields: Any) -> pb.Result:
    return pb.Result(job_id=job_id, **{"outcome": OK, "model_name": "m", **fields})


def test_a_result_with_its_answer(served: Served) -> None:
    async def get(request: pb.GetResultRequest, context: Any) -> pb.GetResultResponse:
        if request.job_id != "j":
            await context.abort(grpc.StatusCode.NOT_FOUND, "job x: no result (yet)")
        found = stored("j", labels={"a": "b"}, tenant="t", attempt=2)
        found.recorded_at.FromDatetime(datetime(2026, 11, 24, tzinfo=UTC))
        found.response.outputs.add(name="y", datatype="FP32", shape=[2])
        found.response.raw_output_contents.append(np.float32([1, 2]).tobytes())
        return pb.GetResultResponse(result=found)

    served.on(methods.GET_RESULT, get)
    with Client(served.address) as client:
        result = client.results.get("j")
        with pytest.raises(NotFound, match="no result"):
            client.results.get("x")
    assert (result.outcome, result.labels) == (Outcome.SUCCEEDED, {"a": "b"})
    assert result.recorded_at == datetime(2026, 11, 24, tzinfo=UTC)
    assert result.answer is not None
    assert result.answer.outputs["y"].tolist() == [1, 2]


def test_a_damaged_answer_is_reported(served: Served) -> None:
    lost = stored("j", answer_lost="blob x: it is damaged", attempt=2)

    async def get(request: pb.GetResultRequest, context: Any) -> pb.GetResultResponse:
        return pb.GetResultResponse(result=lost)

    async def query(request: pb.QueryResultsRequest, context: Any) -> pb.QueryResultsResponse:
        return pb.QueryResultsResponse(results=[lost])

    served.on(methods.GET_RESULT, get)
    served.on(methods.QUERY_RESULTS, query)
    with Client(served.address) as client:
        found = client.results.get("j")
        assert [found] == client.results.list(answers=True)
    assert (found.answer, found.answer_lost, found.attempt) == (None, "blob x: it is damaged", 2)


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


def test_a_broken_stream_is_resumed(served: Served) -> None:
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


FILES = {"part-00000.parquet": b"a" * 10, "part-00001.parquet": b"b" * 7, "_manifest.json": b"{}"}


def served_export(served: Served, asked: list[pb.ExportResultsRequest], *, breaks: bool) -> None:
    """An export of FILES in pieces of 4 bytes. With `breaks`, each call breaks within the second file that it sends."""

    async def export(request: pb.ExportResultsRequest, context: Any) -> Any:
        asked.append(request)
        begin = int(request.cursor or 0)
        yield pb.ExportResultsResponse(cursor=str(begin))
        for number, (name, data) in enumerate(list(FILES.items())[begin:], begin):
            yield pb.ExportResultsResponse(cursor=str(number), rows=number)
            for at in range(0, len(data), 4):
                if breaks and number > begin and at:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")
                yield pb.ExportResultsResponse(
                    cursor=str(number + 1), file=name, file_bytes=len(data), offset=at, chunk=data[at : at + 4]
                )
        yield pb.ExportResultsResponse(cursor=str(len(FILES)), parts=2, complete=True)

    served.on(methods.EXPORT_RESULTS, export, "unary_stream")


@pytest.mark.parametrize("breaks", [False, True])
def test_an_export_to_a_local_folder(served: Served, tmp_path: Path, breaks: bool) -> None:
    asked: list[pb.ExportResultsRequest] = []
    served_export(served, asked, breaks=breaks)
    folder = tmp_path / "new" / "folder"
    with Client(served.address) as client:
        *_, last = client.results.export(folder)
        assert (last.complete, last.parts) == (True, 2)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
        assert [request.cursor for request in asked] == (["", "1"] if breaks else [""])
        with pytest.raises(FailedPrecondition, match="holds an export or a part of one"):
            next(client.results.export(folder))
        # With a cursor it goes on there.
        (folder / "part-00001.parquet").unlink()
        assert [at.complete for at in client.results.export(folder, cursor="1")][-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_an_abandoned_export_leaves_no_partial_file(served: Served, tmp_path: Path) -> None:
    served_export(served, [], breaks=False)
    with Client(served.address) as client:
        for at in client.results.export(tmp_path / "out"):
            if at.cursor == "1":
                break
        for _ in zip(range(6), client.results.export(tmp_path / "out", cursor="1"), strict=False):
            pass
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(FILES)


def test_an_export_to_a_url_is_written_by_the_store(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[pb.ExportResultsRequest] = []

    async def export(request: pb.ExportResultsRequest, context: Any) -> Any:
        asked.append(request)
        yield pb.ExportResultsResponse(rows=3, parts=1, bytes=9, cursor="c", complete=True)

    served.on(methods.EXPORT_RESULTS, export, "unary_stream")
    with Client(served.address) as client:
        (only,) = client.results.export("s3://bucket/x", ResultFilter(tenant="t"), answers=False, part_rows=5)
    assert (only.rows, only.parts, only.bytes, only.complete) == (3, 1, 9, True)
    assert (asked[0].url, asked[0].filter.tenant, asked[0].omit_response, asked[0].part_rows) == (
        "s3://bucket/x", "t", True, 5
    )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "piece",
    [
        {"file": "../part-00000.parquet"}, {"file": "x"}, {"file": "/etc/passwd"}, {"file": "part-00000.parquet/x"},
        {"file": "part-00000.parquet", "offset": 5}, {"file": "part-00000.parquet", "offset": -1},
    ],
)  # fmt: skip
def test_invalid_pieces_are_not_written(served: Served, tmp_path: Path, piece: dict[str, Any]) -> None:
    async def export(request: pb.ExportResultsRequest, context: Any) -> Any:
        yield pb.ExportResultsResponse(**{"file_bytes": 9, "chunk": b"x", **piece})

    served.on(methods.EXPORT_RESULTS, export, "unary_stream")
    with Client(served.address) as client, pytest.raises(DataLoss):
        list(client.results.export(tmp_path / "out"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written(served: Served, tmp_path: Path) -> None:
    served_export(served, [], breaks=False)
    (tmp_path / "file").write_text("")
    with Client(served.address) as client, pytest.raises(FailedPrecondition, match="cannot export"):
        list(client.results.export(tmp_path / "file" / "out"))


def test_a_filter_is_checked_and_translated() -> None:
    with pytest.raises(InvalidArgument, match="use one of succeeded, failed, cancelled, expired"):
        to_filter(ResultFilter(outcome="dead"))
    whole = ResultFilter(
        job_ids=("a", "b"), model="m", version="1", tenant="t", outcome=Outcome.EXPIRED, labels={"k": "v"},
        since=datetime(2026, 1, 1, tzinfo=UTC), until=datetime(2026, 1, 2, tzinfo=UTC),
    )  # fmt: skip
    message = to_filter(whole)
    assert len(message.ListFields()) == len(pb.ResultFilter.DESCRIPTOR.fields)
    query = to_query(message, page_size=7)
    assert query.page_size == 7
    for descriptor, value in message.ListFields():
        assert getattr(query, descriptor.name) == value
