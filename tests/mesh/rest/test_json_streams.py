"""Streams of responses as JSON at a server in this process: records, errors, queries, readers that go or are slow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mesh.rest import heartbeats
from mesh.rest.app import RestApp
from mesh.rpc.server import Rpc, Server
from shoal.errors import NotFound, Unavailable
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.breakable import until
from tests.mesh.http1.raw import RawClient, Response

JOB = "01J0000000000000000000000A"
WATCH, RESULTS = f"/shoal/v1/jobs/{JOB}:watch", "/shoal/v1/results:stream"
SSE = "Accept: text/event-stream"
PATIENCE_S = 30.0


class Jobs(ingest_pb2_grpc.IngestServiceServicer):
    """Watches whose transitions the test sends."""

    def __init__(self) -> None:
        self.moves: asyncio.Queue[Any] = asyncio.Queue()
        self.sent = self.open = 0
        self.endless = False

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.open += 1
        try:
            while self.endless or (move := await self.moves.get()) is not None:
                if self.endless:
                    move = ingest_pb2.JOB_STATE_QUEUED
                if isinstance(move, Exception):
                    raise move
                labels = {"long": "x" * (1 << 16)} if self.endless else {}
                yield ingest_pb2.WatchJobResponse(job=ingest_pb2.Job(id=request.id, state=move, labels=labels))
                self.sent += 1
        finally:
            self.open -= 1


class Results(store_pb2_grpc.StoreServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def StreamResults(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        yield store_pb2.StreamResultsResponse(cursor="c0")
        results = [store_pb2.Result(job_id=str(n), labels={"a": "b"}) for n in range(3)]
        results[0].response.raw_output_contents.append(b"\x00\xff")
        yield store_pb2.StreamResultsResponse(results=results, cursor="c1", complete=True)


class World:
    def __init__(self, jobs: Jobs, results: Results, server: Server) -> None:
        self.jobs = jobs
        self.results = results
        self.server = server

    async def get(self, path: str, *headers: str) -> Response:
        async with await RawClient.connect(self.server.address) as client:
            return await client.request("GET", path, None, *headers)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    jobs, results = Jobs(), Results()
    rpcs = [
        Rpc(
            ingest_pb2.DESCRIPTOR.services_by_name["IngestService"],
            lambda server: ingest_pb2_grpc.add_IngestServiceServicer_to_server(jobs, server),
        ),
        Rpc(
            store_pb2.DESCRIPTOR.services_by_name["StoreService"],
            lambda server: store_pb2_grpc.add_StoreServiceServicer_to_server(results, server),
        ),
    ]
    streams = {"watch job": ingest_pb2.WatchJobRequest, "stream results": store_pb2.StreamResultsRequest}
    listen = f"unix:{tmp_path}/s.sock"
    server = Server(
        listen, rpcs, drain_ms=60_000, http=lambda grpc: RestApp(grpc, {}, streams=streams), unread_bytes=1 << 20
    )
    async with server:
        yield World(jobs, results, server)


def move(world: World, *moves: Any) -> None:
    for each in moves:
        world.jobs.moves.put_nowait(each)


def lines(response: Response) -> list[Any]:
    return [json.loads(line) for line in response.body.decode().splitlines() if line]


def events(response: Response) -> list[Any]:
    parts = response.body.decode().split("\n\n")
    assert parts.pop() == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts if part != ":"]


async def test_messages_are_records_of_either_form(world: World) -> None:
    unwanted = f"{SSE};q=0, application/x-ndjson"
    for headers, kind, read in (
        ((), "application/x-ndjson", lines),
        ((SSE,), "text/event-stream", events),
        ((f"{SSE};q=0.5, application/x-ndjson;q=0",), "text/event-stream", events),
        ((unwanted,), "application/x-ndjson", lines),
    ):
        move(world, ingest_pb2.JOB_STATE_QUEUED, ingest_pb2.JOB_STATE_SUCCEEDED, None)
        response = await world.get(WATCH, *headers)
        assert (response.status, response.headers["content-type"]) == (200, kind)
        assert "content-encoding" not in response.headers
        found = read(response)
        assert [record["job"]["state"] for record in found] == ["JOB_STATE_QUEUED", "JOB_STATE_SUCCEEDED"]
        assert found[0]["job"]["id"] == JOB
        assert found[0]["job"]["labels"] == {}, "empty fields are there, as in JSON calls"
    first, second = lines(await world.get(RESULTS, "Accept-Encoding: gzip"))
    assert first == {"results": [], "cursor": "c0", "watch_token": "", "complete": False}
    assert (second["cursor"], second["complete"]) == ("c1", True)
    assert [result["job_id"] for result in second["results"]] == ["0", "1", "2"]
    assert second["results"][0]["response"]["raw_output_contents"] == ["AP8="]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("text/event-stream;q=0, application/x-ndjson", "application/x-ndjson"),
        ("application/x-ndjson, TEXT/event-stream ; charset=utf-8 ; Q=0.00", "application/x-ndjson"),
        ("text/event-streams", "application/x-ndjson"),
        ('application/json;profile="text/event-stream"', "application/x-ndjson"),
        ("application/x-ndjson;q=0, Text/Event-Stream;charset=utf-8;q=0.1", "text/event-stream"),
    ],
)
async def test_a_stream_has_events_only_where_the_request_accepts_them(world: World, accept: str, kind: str) -> None:
    assert (await world.get(RESULTS, f"Accept: {accept}")).headers["content-type"] == kind


async def test_a_query_sets_fields_and_is_refused_by_name(world: World) -> None:
    query = "filter.model_name=a%20b&filter.job_ids=1&filter.job_ids=2&filter.labels.k.x=v&omit_response=true"
    assert (await world.get(f"{RESULTS}?{query}&filter.since=2026-11-28T12:00:00Z&cursor=c")).status == 200
    wanted = store_pb2.StreamResultsRequest(cursor="c", omit_response=True)
    wanted.filter.MergeFrom(store_pb2.ResultFilter(model_name="a b", job_ids=["1", "2"], labels={"k.x": "v"}))
    wanted.filter.since.FromJsonString("2026-11-28T12:00:00Z")
    assert world.results.requests == [wanted]
    for path, words in (
        (f"{RESULTS}?filter.model=m", "shoal.store.v1.ResultFilter has no field 'filter.model'"),
        (f"{RESULTS}?modelname=m", "shoal.store.v1.StreamResultsRequest has no field 'modelname'"),
        (f"{RESULTS}?filter=m", "has no field 'filter'"),
        (f"{RESULTS}?cursor=a&cursor=b", "has the field 'cursor' twice"),
        (f"{RESULTS}?omit_response=yes", "field 'omit_response': expected true or false, got 'yes'"),
        (f"{RESULTS}?filter.outcome=FINE", "FINE"),
        (f"{RESULTS}?filter.since=today", "since"),
        (f"{RESULTS}?cursor", "the query is malformed"),
        (f"{RESULTS}?cursor=%FF", "the query is malformed"),
        (f"{RESULTS}?" + "&".join(["filter.job_ids=x"] * 1_101), "at most 1100 fields"),
        (f"{WATCH}?id=x", "field 'id' is in the path"),
        (f"{WATCH}?" + "x" * 500 + "=1", "has no field 'xxx"),
    ):
        response = await world.get(path)
        found = json.loads(response.body)
        assert (response.status, found["code"], found["details"]) == (400, 3, []), path
        assert words in found["message"]
        assert len(found["message"]) < 1_000
    async with await RawClient.connect(world.server.address) as client:
        response = await client.request("GET", WATCH, b"{}")
        assert (response.status, "takes no body" in json.loads(response.body)["message"]) == (400, True)
        response = await client.request("POST", WATCH)
        # RFC 9110, section 15.5.6.
        assert (response.status, response.headers["allow"].upper()) == (405, "GET")
        assert (await client.request("GET", f"/shoal/v1/jobs/{JOB}")).status == 404
    assert len(world.results.requests) == 1


async def test_an_error_before_the_first_record_is_the_response_and_later_the_last_record(world: World) -> None:
    for headers, read in (((), lines), ((SSE,), events)):
        move(world, NotFound(f"no job {JOB}"))
        response = await world.get(WATCH, *headers)
        assert (response.status, response.headers["content-type"]) == (404, "application/json")
        assert json.loads(response.body) == {"code": 5, "message": f"no job {JOB}", "details": []}
        move(world, ingest_pb2.JOB_STATE_QUEUED, Unavailable("ünavailable", retry_after_ms=5))
        response = await world.get(WATCH, *headers)
        assert response.status == 200
        first, last = read(response)
        assert first["job"]["state"] == "JOB_STATE_QUEUED"
        assert last == {"error": {"code": 14, "message": "ünavailable", "details": []}}
        move(world, ingest_pb2.JOB_STATE_QUEUED, RuntimeError("secret"))
        assert read(await world.get(WATCH, *headers))[-1]["error"]["code"] == 13
    move(world, ingest_pb2.JOB_STATE_QUEUED)
    late = await world.get(WATCH, "grpc-timeout: 2S")
    assert lines(late)[-1]["error"]["code"] == 4, "the deadline"


async def test_a_silent_stream_has_heartbeats(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "HEARTBEAT_S", 0.01)
    for headers, beat in (((), b"\n"), ((SSE,), b":\n\n")):
        async with await RawClient.connect(world.server.address) as client:
            move(world, ingest_pb2.JOB_STATE_QUEUED)
            client.send("\r\n".join([f"GET {WATCH} HTTP/1.1", "Host: test", *headers, "", ""]).encode())
            async with asyncio.timeout(PATIENCE_S):
                await client.reader.readuntil(b"\r\n\r\n")
                chunks = []
                for _ in range(4):
                    size = int(await client.reader.readuntil(b"\r\n"), 16)
                    chunks.append(await client.reader.readexactly(size))
                    await client.reader.readexactly(2)
            assert b"JOB_STATE_QUEUED" in chunks[0]
            assert chunks[1:] == [beat] * 3
            move(world, None)
            await until(lambda: world.jobs.open == 0, "the watch ends")


async def test_a_client_that_leaves_ends_the_watch(world: World) -> None:
    async with await RawClient.connect(world.server.address) as client:
        move(world, ingest_pb2.JOB_STATE_QUEUED)
        client.send(f"GET {WATCH} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await until(lambda: world.jobs.sent == 1, "the first record is sent")
        assert world.jobs.open == 1
    await until(lambda: world.jobs.open == 0, "the watch ends")


async def test_a_client_that_does_not_read_gets_no_more_than_its_bound_and_others_are_served(world: World) -> None:
    world.jobs.endless = True
    async with await RawClient.connect(world.server.address) as client:
        client.writer.transport.pause_reading()
        client.send(f"GET {WATCH} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        before = -1
        while before != world.jobs.sent:
            before = world.jobs.sent
            for _ in range(20):
                assert (await world.get(RESULTS)).status == 200
        # A record has 64 KiB. The socket and the buffers of both ends take some.
        assert world.jobs.sent < 256
        assert world.server.memory.unread.held < 2 << 20
        assert world.jobs.open == 1
    await until(lambda: world.jobs.open == 0, "the watch ends")
    assert world.server.memory.unread.held == 0


async def test_a_stop_ends_an_idle_stream_with_an_error(tmp_path: Path, world: World) -> None:
    async with await RawClient.connect(world.server.address) as client:
        move(world, ingest_pb2.JOB_STATE_QUEUED)
        client.send(f"GET {WATCH} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await until(lambda: world.jobs.sent == 1, "the first record is sent")
        stopping = asyncio.create_task(world.server.__aexit__(None, None, None))
        response = await client.response()
        assert lines(response)[-1]["error"] == {
            "code": 14,
            "message": "this instance is stopping: open the stream again",
            "details": [],
        }
        await stopping
