"""Server of all services: errors reach the caller with their status, and a stop lets running calls finish."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.h2.headers import Block
from mesh.process.config import ConfigError, ServiceConfig, load
from mesh.process.logs import JsonFormatter
from mesh.rpc.channel import connect
from mesh.rpc.fast_call import FastCall
from mesh.rpc.grpc_app import GrpcApp
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.interceptors import translated
from mesh.rpc.server import STALLS_KEY, Rpc, Server
from mesh.rpc.task_methods import TaskMethods
from shoal import errors
from shoal.coord.v1 import coord_pb2 as pb
from shoal.coord.v1 import coord_pb2_grpc as rpc
from tests.breakable import until
from tests.http2 import Connection

SERVICE = pb.DESCRIPTOR.services_by_name["CoordService"]


class Answers(rpc.CoordServiceServicer):
    """A servicer whose answers each test chooses."""

    def __init__(self) -> None:
        self.leader: Callable[[], Awaitable[pb.GetLeaderResponse]] = self.refuse
        self.entered = asyncio.Event()

    async def refuse(self) -> pb.GetLeaderResponse:
        raise errors.Unavailable("nobody leads", retry_after_ms=250)

    async def GetLeader(self, request: Any, context: Any) -> pb.GetLeaderResponse:
        self.entered.set()
        return await self.leader()

    async def WatchInstances(self, request: Any, context: Any) -> AsyncIterator[pb.WatchInstancesResponse]:
        yield pb.WatchInstancesResponse(revision=1)
        await asyncio.Event().wait()


def server(servicer: Answers, run_dir: Path) -> Server:
    add = lambda target: rpc.add_CoordServiceServicer_to_server(servicer, target)  # noqa: E731
    return Server(f"unix:{run_dir}/x.sock", [Rpc(SERVICE, add)], drain_ms=5_000)


async def test_an_error_arrives_as_the_class_that_was_raised(run_dir: Path) -> None:
    async with server(Answers(), run_dir) as running, connect(running.address) as channel:
        with pytest.raises(errors.Unavailable, match="asking: nobody leads") as caught, translated("asking"):
            await rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest())
        assert caught.value.retry_after_ms == 250


@pytest.mark.parametrize("error", errors.BY_CODE.values())
async def test_every_error_of_the_tree_crosses_the_wire(run_dir: Path, error: type[errors.ShoalError]) -> None:
    servicer = Answers()

    async def fail() -> pb.GetLeaderResponse:
        raise error("why")

    servicer.leader = fail
    async with server(servicer, run_dir) as running, connect(running.address) as channel:
        with pytest.raises(error, match="why"), translated():
            await rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest())


async def test_a_fault_tells_the_log_everything_and_the_caller_little(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    servicer = Answers()

    async def fault() -> pb.GetLeaderResponse:
        raise ValueError("secret")

    servicer.leader = fault
    async with server(servicer, run_dir) as running, connect(running.address) as channel:
        with pytest.raises(errors.Internal) as caught, translated():
            await rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest())
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


@pytest.mark.parametrize("method", ["GetLeader", "DrainInstance"])
async def test_bytes_that_are_no_message_are_the_callers_fault(run_dir: Path, method: str) -> None:
    async with server(Answers(), run_dir) as running, connect(running.address) as channel:
        call = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        with pytest.raises(errors.InvalidArgument, match="not a message"), translated():
            await call(b"\xff\xff\xff\xff")


async def test_a_stop_lets_a_call_finish_and_ends_idle_watchers(run_dir: Path) -> None:
    servicer = Answers()
    release = asyncio.Event()

    async def slow() -> pb.GetLeaderResponse:
        await release.wait()
        return pb.GetLeaderResponse(instance="done")

    servicer.leader = slow
    async with connect(f"unix:{run_dir}/x.sock") as channel:
        stub = rpc.CoordServiceStub(channel)
        async with server(servicer, run_dir) as running:
            await running.serve()
            watch = stub.WatchInstances(pb.WatchInstancesRequest())
            assert (await watch.read()).revision == 1
            answer = asyncio.ensure_future(stub.GetLeader(pb.GetLeaderRequest()))
            await servicer.entered.wait()
            asyncio.get_running_loop().call_later(0.1, release.set)
        assert (await answer).instance == "done"
        with pytest.raises(errors.Unavailable, match="stopping"), translated():
            await watch.read()
    assert not (run_dir / "x.sock").exists()


async def test_health_is_serving_only_after_serve(run_dir: Path) -> None:
    async with server(Answers(), run_dir) as running, connect(running.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE.full_name):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await running.serve()
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("is_fast", [False, True])
async def test_a_message_beyond_the_bounds_of_its_parse_is_rejected_on_both_paths(run_dir: Path, is_fast: bool) -> None:
    path = f"/{SERVICE.full_name}/GetLeader"
    servicer = Answers()

    async def leader(request: pb.GetLeaderRequest, headers: object) -> pb.GetLeaderResponse:
        return await servicer.leader()

    async with TaskMethods() as tasks:
        fast = tasks.method(path, pb.GetLeaderRequest.FromString, leader) if is_fast else {}
        add = lambda target: rpc.add_CoordServiceServicer_to_server(servicer, target)  # noqa: E731
        running = Server(f"unix:{run_dir}/x.sock", [Rpc(SERVICE, add)], drain_ms=5_000, fast_methods=fast)
        async with running, connect(running.address) as channel:
            call = channel.unary_unary(path)
            with pytest.raises(errors.InvalidArgument, match="more than 100000 fields"), translated():
                await call(b"\x78\x01" * 200_000)
            with pytest.raises(errors.InvalidArgument, match="not a message"), translated():
                await call(b"\x78\x01" * 5_000 + b"\x07")
            with pytest.raises(errors.Unavailable, match="nobody leads"), translated():
                await call(b"\x78\x01" * 90_000)


async def test_a_stop_ends_the_calls_whose_messages_wait_to_be_parsed(run_dir: Path) -> None:
    heavy = HeavyWork()
    add = lambda target: rpc.add_CoordServiceServicer_to_server(Answers(), target)  # noqa: E731
    async with connect(f"unix:{run_dir}/x.sock") as channel:
        async with Server(f"unix:{run_dir}/x.sock", [Rpc(SERVICE, add)], drain_ms=0, heavy=heavy):
            call = channel.unary_unary(f"/{SERVICE.full_name}/GetLeader")
            calls = [asyncio.ensure_future(call(b"\x78\x01" * 90_000, timeout=30)) for _ in range(30)]
            await until(lambda: len(heavy._waiting.get(b"", ())) > 10)
        assert not heavy._waiting
        ends = await asyncio.gather(*calls, return_exceptions=True)
    # Those that were parsed have "nobody leads".
    texts = [end.details() for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert len(texts) == len(calls)
    assert texts.count("nobody leads") < len(calls) - 10


async def test_a_health_check_reports_the_stalls_of_the_event_loop(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(Answers(), run_dir) as running, connect(running.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def report() -> dict[str, Any]:
            call = stub.Check(health_pb2.HealthCheckRequest())
            await call
            return dict(json.loads(dict(await call.trailing_metadata())[STALLS_KEY]))

        before = await report()
        began = time.time()
        # The call below blocks the event loop itself.
        time.sleep(0.4)
        await asyncio.sleep(0.05)
        after = await report()
    assert after["count"] > before["count"]
    assert after["total_ms"] >= before["total_ms"] + 370
    assert after["longest_ms"] >= 370
    # It ended after the call below. It may have begun before: when the loop was already late.
    assert [ms for at, ms in after["recent"] if at + ms / 1000 >= began + 0.37 and ms >= 370]
    warnings = [record for record in caplog.records if record.name == "mesh.process.stall_watch"]
    assert any(record.args["stall_ms"] >= 370 for record in warnings)


async def test_the_error_names_a_port_in_use() -> None:
    async with Server("127.0.0.1:0", [], drain_ms=0) as first:
        with pytest.raises(OSError, match="in use"):
            async with Server(first.address, [], drain_ms=0):
                pass


async def test_a_big_message_passes_and_a_bigger_one_is_refused(run_dir: Path) -> None:
    servicer = Answers()
    async with server(servicer, run_dir) as running, connect(running.address) as channel:
        stub = rpc.CoordServiceStub(channel)
        with pytest.raises(errors.Unimplemented, match="does not implement"), translated():
            await stub.DrainInstance(pb.DrainInstanceRequest(name="x" * (100 << 20)))
        call = channel.unary_unary(f"/{SERVICE.full_name}/GetLeader")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"x" * (129 << 20))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, "SHOAL_X_INSTANCE is required and not set"),
        ({"SHOAL_X_INSTANCE": "x-0", "SHOAL_X_LISTEN": "nowhere"}, "SHOAL_X_LISTEN='nowhere'"),
        ({"SHOAL_X_INSTANCE": "x-0", "SHOAL_X_LISTEN": "a:1", "SHOAL_X_TYPO": "1"}, "SHOAL_X_TYPO is not a setting"),
        ({"SHOAL_X_INSTANCE": "x-0", "SHOAL_X_LISTEN": "a:1", "SHOAL_X_DRAIN_MS": "-1"}, "SHOAL_X_DRAIN_MS='-1'"),
        ({"SHOAL_X_INSTANCE": "X 0", "SHOAL_X_LISTEN": "a:1"}, "SHOAL_X_INSTANCE='X 0'"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match="known variables") as caught:
        load(ServiceConfig, "x", environ)
    assert named in str(caught.value)


def test_a_log_line_is_json_with_its_fields() -> None:
    values = {"event": "job.greeted", "job": "j1", "level": "no field of an event"}
    record = logging.makeLogRecord({"name": "a", "levelname": "INFO", "msg": "hello %(job)s", "args": values})
    entry = json.loads(JsonFormatter("local/x-0").format(record))
    assert (entry["message"], entry["job"], entry["event"]) == ("hello j1", "j1", "job.greeted")
    assert (entry["instance"], entry["level"]) == ("local/x-0", "INFO")


@pytest.mark.parametrize("listen", ["unix:{}/x.sock", "127.0.0.1:0"])
async def test_a_path_that_is_no_text_ends_no_server(run_dir: Path, listen: str) -> None:
    servicer, go = Answers(), asyncio.Event()

    async def lead() -> pb.GetLeaderResponse:
        await go.wait()
        return pb.GetLeaderResponse(instance="me")

    servicer.leader = lead
    add = lambda target: rpc.add_CoordServiceServicer_to_server(servicer, target)  # noqa: E731
    made = Server(listen.format(run_dir), [Rpc(SERVICE, add)], drain_ms=20_000)
    async with made as running, connect(running.address) as channel:
        await running.serve()
        before = asyncio.ensure_future(rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest()))
        await servicer.entered.wait()
        for _ in range(3):
            await until(lambda: is_serving(running.address))

            def spoil() -> None:
                with Connection(running.address) as connection:
                    connection.call(b"", "/shoal.coord.v1.CoordService/GetLead\xe9r")

            await asyncio.to_thread(spoil)
        await until(lambda: is_serving(running.address))
        go.set()
        assert (await before).instance == "me"


async def is_serving(address: str) -> bool:
    async with connect(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("kind", "is_fast"),
    [(b"application/grpc", True), (b"application/grpc+proto", True), (b"application/grpc; charset=utf-8", False)],
)
async def test_a_call_of_a_usual_content_type_takes_the_fast_path(kind: bytes, is_fast: bool) -> None:
    app = GrpcApp({"/t.T/Fast": None}, {"/t.T/Fast": lambda body, call: None})
    head = Block(((b":method", b"POST"), (b":path", b"/t.T/Fast"), (b"content-type", kind)))
    handler = app.request(cast("Any", SimpleNamespace(head=head, is_request_ended=False, peer=("unix", 0))))
    assert isinstance(handler, FastCall) is is_fast
    for task in app.tasks:
        task.cancel()
