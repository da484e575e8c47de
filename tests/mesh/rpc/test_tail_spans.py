"""Spans of calls that were not sampled: failed and slow ones leave one, within bounds for each tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from mesh.process import telemetry
from mesh.process.kept_spans import (
    TAIL_A_SECOND,
    TAIL_KEPT,
    TAIL_OF_TENANT,
    TAIL_OF_TENANT_A_SECOND,
    KeptSpans,
    TailSpans,
)
from mesh.rpc import tail_spans
from mesh.rpc.channel import AnyChannel, connect
from mesh.rpc.fast_call import FastCall, FastHandler
from mesh.rpc.interceptors import translated
from mesh.rpc.server import Rpc, Server
from mesh.rpc.task_methods import TaskMethods
from shoal import errors
from shoal.coord.v1 import coord_pb2 as pb
from shoal.coord.v1 import coord_pb2_grpc as rpc
from tests.breakable import PATIENCE_S

SERVICE = pb.DESCRIPTOR.services_by_name["CoordService"]
GET_LEADER = f"/{SERVICE.full_name}/GetLeader"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
UNSAMPLED, SAMPLED = f"00-{TRACE}-00f067aa0ba902b7-00", f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptSpans:
    found = KeptSpans(lambda: 0.0, instance="n/x-0")
    monkeypatch.setattr(telemetry, "kept_spans", lambda: found)
    # No call is slow by chance.
    monkeypatch.setattr(tail_spans, "SLOW_S", 3_600.0)
    return found


def server(run_dir: Path, leader: Callable[[], Awaitable[Any]], *, name: str = "x", **more: Any) -> Server:
    class Answers(rpc.CoordServiceServicer):
        async def GetLeader(self, request: Any, context: Any) -> Any:
            return await leader()

    add = lambda target: rpc.add_CoordServiceServicer_to_server(Answers(), target)  # noqa: E731
    return Server(f"unix:{run_dir}/{name}.sock", [Rpc(SERVICE, add)], drain_ms=5_000, **more)


def failing(error: BaseException) -> Callable[[], Awaitable[Any]]:
    async def fail() -> Any:
        raise error

    return fail


async def succeeding() -> Any:
    return pb.GetLeaderResponse()


async def error_of(channel: AnyChannel, *metadata: tuple[str, str]) -> errors.ShoalError:
    with pytest.raises(errors.ShoalError) as caught, translated():
        await rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest(), metadata=metadata)
    return caught.value


async def test_a_failed_call_leaves_a_span_whose_trace_its_error_names(run_dir: Path, kept: KeptSpans) -> None:
    async with server(run_dir, failing(errors.Unavailable("nobody leads"))) as one, connect(one.address) as channel:
        error = await error_of(channel, ("x-shoal-tenant", "acme"))
        again = await error_of(channel)
    [span] = kept.of_trace(error.trace_id)
    assert (span["name"], span["error"], span["instance"]) == (GET_LEADER[1:], "nobody leads", "n/x-0")
    assert (span["attributes"]["shoal.tenant"], span["attributes"]["rpc.grpc.status_code"]) == ("acme", 14)
    assert span["end_ns"] >= span["start_ns"]
    assert again.trace_id != error.trace_id


async def test_an_unexpected_error_keeps_its_text_from_the_span(run_dir: Path, kept: KeptSpans) -> None:
    async with server(run_dir, failing(ValueError("secret"))) as one, connect(one.address) as channel:
        error = await error_of(channel)
    [span] = kept.of_trace(error.trace_id)
    assert "secret" not in str(span)


@pytest.mark.parametrize("kind", [errors.InvalidArgument, errors.NotFound, errors.PermissionDenied, errors.Aborted])
async def test_an_error_that_is_the_callers_doing_leaves_none(
    run_dir: Path, kept: KeptSpans, kind: type[errors.ShoalError]
) -> None:
    async with server(run_dir, failing(kind("why"))) as one, connect(one.address) as channel:
        error = await error_of(channel, ("traceparent", UNSAMPLED))
    assert (error.trace_id, kept.of_trace(TRACE)) == ("", [])


async def test_the_trace_of_the_caller_is_kept_sampled_or_not(run_dir: Path, kept: KeptSpans) -> None:
    async with server(run_dir, failing(errors.Internal("broken"))) as one, connect(one.address) as channel:
        assert (await error_of(channel, ("traceparent", UNSAMPLED))).trace_id == TRACE
        [span] = kept.of_trace(TRACE)
        assert span["parent"] == "00f067aa0ba902b7"
        # The span of a sampled call is made when it begins, or never.
        await error_of(channel, ("traceparent", SAMPLED))
    assert kept.of_trace(TRACE) == [span]


async def test_a_failure_has_one_trace_in_all_processes_that_it_crossed(run_dir: Path, kept: KeptSpans) -> None:
    async with server(run_dir, failing(errors.DataLoss("rotten")), name="b") as b, connect(b.address) as to_b:

        async def forward() -> Any:
            return await rpc.CoordServiceStub(to_b).GetLeader(pb.GetLeaderRequest())

        async with server(run_dir, forward, name="a") as a, connect(a.address) as to_a:
            error = await error_of(to_a)
    assert [span["name"] for span in kept.of_trace(error.trace_id)] == [GET_LEADER[1:]] * 2


@pytest.mark.parametrize("is_fast", [False, True])
async def test_only_slow_calls_that_succeed_leave_a_span(
    run_dir: Path, kept: KeptSpans, monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    async def leader(request: Any, headers: object) -> Any:
        return await succeeding()

    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(TaskMethods())
        fast = tasks.method(GET_LEADER, pb.GetLeaderRequest.FromString, leader) if is_fast else {}
        one = await stack.enter_async_context(server(run_dir, succeeding, fast_methods=fast))
        channel = await stack.enter_async_context(connect(one.address))
        get_leader = rpc.CoordServiceStub(channel).GetLeader
        call = get_leader(pb.GetLeaderRequest(), metadata=(("traceparent", UNSAMPLED),))
        await call
        assert (kept.of_trace(TRACE), errors.trace_of(await call.trailing_metadata())) == ([], "")
        monkeypatch.setattr(tail_spans, "SLOW_S", 0.0)
        call = get_leader(pb.GetLeaderRequest(), metadata=(("traceparent", UNSAMPLED),))
        await call
        assert errors.trace_of(await call.trailing_metadata()) == TRACE
    [span] = kept.of_trace(TRACE)
    assert span["error"] == ""


@pytest.mark.parametrize("is_fast", [False, True])
async def test_a_call_whose_client_leaves_is_no_failure(run_dir: Path, kept: KeptSpans, is_fast: bool) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def leader(*_: object) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(TaskMethods())
        fast = tasks.method(GET_LEADER, pb.GetLeaderRequest.FromString, leader) if is_fast else {}
        one = await stack.enter_async_context(server(run_dir, leader, fast_methods=fast))
        channel = await stack.enter_async_context(connect(one.address))
        call = rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest(), metadata=(("traceparent", UNSAMPLED),))
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
            call.cancel()
            await ended.wait()
    assert kept.of_trace(TRACE) == []


def replying(call: FastCall) -> None:
    call.reply((), 0)


def replying_slowly(call: FastCall) -> None:
    call.reply_slow((), 0, 2.5, {"shoal.model": "digits"})


def refusing(call: FastCall) -> None:
    call.refuse(errors.ResourceExhausted("full"), 1.5, {"shoal.model": "digits"})


@pytest.mark.parametrize(
    ("end", "found"),
    [(replying, []), (replying_slowly, [("", "digits", 2_500)]), (refusing, [("full", "digits", 1_500)])],
)
async def test_a_call_on_the_fast_path_leaves_the_same(
    run_dir: Path, kept: KeptSpans, end: Callable[[FastCall], None], found: list[tuple[str, str, int]]
) -> None:
    handle: FastHandler = lambda body, call: end(call)  # noqa: E731
    async with server(run_dir, succeeding, fast_methods={GET_LEADER: handle}) as one, connect(one.address) as channel:
        call = rpc.CoordServiceStub(channel).GetLeader(pb.GetLeaderRequest())
        if end is refusing:
            with pytest.raises(errors.ResourceExhausted) as caught, translated():
                await call
            trace_id = caught.value.trace_id
        else:
            await call
            trace_id = errors.trace_of(await call.trailing_metadata())
    spans = kept.of_trace(trace_id) if trace_id else []
    assert [
        (span["error"], span["attributes"]["shoal.model"], (span["end_ns"] - span["start_ns"]) // 1_000_000)
        for span in spans
    ] == found


async def test_a_flood_of_one_tenants_failures_leaves_the_spans_of_others(run_dir: Path, kept: KeptSpans) -> None:
    async with server(run_dir, failing(errors.ResourceExhausted("full"))) as one, connect(one.address) as channel:
        victim = await error_of(channel, ("x-shoal-tenant", "globex"))
        flood = [await error_of(channel, ("x-shoal-tenant", "acme")) for _ in range(50)]
        late = await error_of(channel, ("x-shoal-tenant", "globex"))
    assert sum(bool(error.trace_id) for error in flood) == TAIL_OF_TENANT_A_SECOND
    assert kept.of_trace(victim.trace_id)
    assert kept.of_trace(late.trace_id)


def test_a_failure_that_leaves_no_span_names_the_trace_of_its_cause(kept: KeptSpans) -> None:
    def failed(cause: str) -> str:
        return tail_spans.failed(GET_LEADER, {}, None, errors.Code.INTERNAL, "broken", seconds=0.0, cause=cause)

    assert all(failed("") for _ in range(TAIL_OF_TENANT_A_SECOND))
    assert (failed(""), failed(TRACE), kept.of_trace(TRACE)) == ("", TRACE, [])


def test_the_tail_is_bounded_by_tenant_in_a_second_and_in_all() -> None:
    now = 0.0
    tail = TailSpans(lambda: now)
    assert sum(tail.admits(f"invented-{n}") for n in range(10_000)) == TAIL_A_SECOND
    now = 1.0
    assert tail.admits("globex")
    tail.add("globex", {"of": "globex"})
    for n in range(2 * TAIL_OF_TENANT):
        tail.add("acme", {"of": "acme", "n": n})
    assert [span["n"] for span in tail.all() if span["of"] == "acme"] == list(range(TAIL_OF_TENANT, 2 * TAIL_OF_TENANT))
    for n in range(2 * TAIL_KEPT):
        tail.add(f"invented-{n % 100}", {"of": "invented"})
    found = tail.all()
    assert len(found) == TAIL_KEPT
    # The tenants with the most lose their oldest.
    assert {"of": "globex"} in found
