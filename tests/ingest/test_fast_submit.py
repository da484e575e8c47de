"""Submit on the fast path: a large message waits for its turn to be parsed, and is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest

from mesh.rpc.framing import framed
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.tenant_scope import Scopes, TenantScope
from services.ingest.fast_submit import FastSubmit
from services.ingest.intake.intake import Accepted, Intake
from services.ingest.rpc import SERVICE
from shoal.errors import InvalidArgument, Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb


class Requests:
    """Fake intake: keeps the requests, and never writes them."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def begin(self, request: pb.SubmitRequest, traceparent: str, scope: TenantScope) -> asyncio.Future[Accepted]:
        self.keys.append(request.idempotency_key)
        return asyncio.get_running_loop().create_future()


class Call:
    """Fake fast call: keeps the error that ends it."""

    traceparent = ""
    headers: ClassVar[dict[bytes, bytes]] = {}
    tenant = b""

    def __init__(self) -> None:
        self.on_end: Callable[[], object] = lambda: None
        self.error: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.heavy = HeavyWork()

    def refuse(self, error: BaseException) -> None:
        if not self.error.done():
            self.error.set_result(error)


def handler(intake: Requests) -> Callable[[bytes, Any], None]:
    return FastSubmit(cast("Intake", intake), Scopes(SERVICE))


def body(request: pb.SubmitRequest, more: bytes = b"") -> bytes:
    return framed(request.SerializeToString() + more)


async def test_large_requests_begin_as_small_ones_do() -> None:
    intake, calls = Requests(), [Call() for _ in range(3)]
    handle = handler(intake)
    large = pb.SubmitRequest(idempotency_key="large")
    large.request.raw_input_contents.append(bytes(1 << 20))
    handle(body(large), calls[0])
    handle(body(pb.SubmitRequest(idempotency_key="small")), calls[1])
    assert intake.keys == ["small"]
    while len(intake.keys) < 2:
        await asyncio.sleep(0)
    assert intake.keys == ["small", "large"]
    for call in calls[:2]:
        call.on_end()
        assert isinstance(await asyncio.wait_for(call.error, 30), Unavailable)


@pytest.mark.parametrize(("more", "error"), [(b"\x78\x01" * 200_000, "fields"), (b"\x07" * 5_000, "not a message")])
async def test_a_request_out_of_bounds_or_malformed_is_rejected(more: bytes, error: str) -> None:
    intake, call = Requests(), Call()
    handler(intake)(body(pb.SubmitRequest(), more), call)
    with pytest.raises(InvalidArgument, match=error):
        raise await asyncio.wait_for(call.error, 30)
    assert not intake.keys


async def test_a_caller_that_leaves_before_the_parse_submits_nothing() -> None:
    intake, call = Requests(), Call()
    handler(intake)(body(pb.SubmitRequest(idempotency_key="k" * 5_000)), call)
    call.on_end()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)
    assert not intake.keys
