"""The contract of the server: kinds of calls, errors, metadata, compression, large messages, the standard services."""

from __future__ import annotations

import asyncio
import json
from itertools import product

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mesh.rpc.limits import MESSAGE_BYTES
from shoal.errors import BY_CODE, Code
from shoal.tenant_header import CONNECTION_HEADER
from tests.long_form import by_form
from tests.mesh.rpc.fronts.conftest import UNARY, Client, Front
from tests.mesh.rpc.fronts.raw import RawConnection
from tests.mesh.rpc.fronts.service import NAME

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", UNARY)
async def test_a_unary_call_is_answered(client: Client, method: str) -> None:
    for value in (b"", b"x", bytes(range(256)) * 999):
        assert await client.call(method, value) == value


async def test_streams_of_each_kind(client: Client) -> None:
    parts = [b"", b"a", b"b" * 70_000, b""]
    assert [part async for part in client.call("ServerStream", b"x", {"do": "echo", "count": 5})] == [b"x"] * 5
    assert [part async for part in client.call("ServerStream", b"x", {"do": "echo", "count": 0})] == []
    assert json.loads(await client.call("ClientStream", iter(parts))) == [0, 1, 70_000, 0]
    assert json.loads(await client.call("ClientStream", iter([]))) == []
    assert [part async for part in client.call("Bidi", iter(parts))] == parts


async def test_bidi_answers_before_the_next_question_and_sees_the_half_close(client: Client) -> None:
    call = client.call("Bidi", None, {"do": "echo", "mark": "pingpong"})
    for number in range(300):
        await call.write(str(number).encode())
        assert await call.read() == str(number).encode()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await client.until_seen("half-closed pingpong")


@pytest.mark.parametrize("method", [*UNARY, "ServerStream", "ClientStream"])
@pytest.mark.parametrize("code", [*BY_CODE, Code.UNKNOWN])
async def test_every_code_arrives_with_its_message_and_its_retry_after(client: Client, method: str, code: Code) -> None:
    said = "näh: 100 %41 of\nit 🐟 \x00 \x7f \t end"
    order = {"do": "fail", "code": int(code), "message": said, "after": 250}
    err = await client.fails(method, iter([]) if method == "ClientStream" else b"", order)
    assert (err.code().value[0], err.details()) == (code, said)
    assert ("retry-after-ms", "250") in [*err.trailing_metadata()]


async def test_an_error_after_answers(client: Client) -> None:
    order = {"do": "echo", "count": 2, "then": {"do": "fail", "code": 9, "message": "now"}}
    call = client.call("ServerStream", b"x", order)
    assert [await call.read(), await call.read()] == [b"x", b"x"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "now")


@pytest.mark.parametrize("method", UNARY)
async def test_a_message_of_any_length_does_not_break_the_call(client: Client, method: str) -> None:
    for said in ("x", "é", "🐟", "%"):
        for times in (1, 1_000, 100_000):
            err = await client.fails(method, order={"do": "fail", "code": 3, "message": said, "times": times})
            assert err.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (err.details() or "").startswith(said * min(times, 400))


@pytest.mark.parametrize("method", [*UNARY, "ServerStream", "ClientStream", "Bidi"])
@pytest.mark.parametrize("kind", ["ValueError", "BaseException", "SystemExit", "KeyboardInterrupt", "MemoryError"])
async def test_no_exception_reads_as_ok(client: Client, method: str, kind: str) -> None:
    request = iter([b"x"]) if method in ("ClientStream", "Bidi") else b"x"
    err = await client.fails(method, request, {"do": "raise", "kind": kind})
    assert err.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (err.details() or "")
    assert await client.call(method if method in UNARY else "Unary", b"still here") == b"still here"


async def test_an_exception_after_answers_reads_as_no_end(client: Client) -> None:
    order = {"do": "echo", "count": 2, "then": {"do": "raise", "kind": "SystemExit"}}
    err = await client.fails("ServerStream", b"x", order)
    assert err.code() is grpc.StatusCode.INTERNAL


async def test_metadata_there_and_back(client: Client) -> None:
    binary = bytes(range(256))
    given = (("x-text", "one"), ("x-text", "two, three"), ("x-b-bin", binary), ("x-b-bin", b""), ("x-a-bin", b"\xff"))
    call = client.call("Unary", order={"do": "metadata"}, metadata=given)
    await call
    for back in (await call.initial_metadata(), await call.trailing_metadata()):
        assert [pair for pair in back if pair[0].startswith("x-")] == [*given]


async def test_envoy_ignores_control_headers_of_callers(front: Front, client: Client) -> None:
    if front.transport != "envoy":
        pytest.skip("no Envoy in front")
    given = (("x-envoy-internal", "true"), ("x-envoy-retry-on", "5xx"), ("x-envoy-upstream-rq-timeout-ms", "1"))
    call = client.call("Unary", order={"do": "metadata"}, metadata=given)
    await call
    assert [key for key, _ in await call.trailing_metadata() if key.startswith("x-")] == []


async def test_envoy_alone_numbers_the_connection_of_a_call(front: Front, client: Client) -> None:
    if front.transport != "envoy":
        pytest.skip("no Envoy in front")
    forged = ((CONNECTION_HEADER, "forged"),)
    numbers = {await client.call("Short", order={"do": "connection"}, metadata=forged) for _ in range(2)}
    assert [number.isdigit() for number in numbers] == [True]


@pytest.mark.parametrize("method", UNARY)
@pytest.mark.parametrize("kind", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_read(client: Client, method: str, kind: grpc.Compression) -> None:
    value = b"0123456789" * 100_000
    assert await client.call(method, value, compression=kind) == value
    assert await client.call(method, b"", compression=kind) == b""


async def test_a_compressed_stream_is_read(client: Client) -> None:
    parts = [b"a" * 100_000, b"", b"b"]
    call = client.call("ClientStream", iter(parts), compression=grpc.Compression.Gzip)
    assert json.loads(await call) == [100_000, 0, 1]


# `started` is the only parameter of its decorator: beside another one it would have the scope of a test.
OVER_TCP = pytest.mark.parametrize("started", ["tcp", "envoy"], indirect=True)


@OVER_TCP
async def test_100_megabytes_there_and_back(front: Front, client: Client) -> None:
    value = bytes(range(256)) * (100 * 4096)
    short = {"tcp": ["Short"], "envoy": ["Tasked"]}[front.transport]
    for method in by_form(short, [*UNARY, "Bidi"]):
        if method == "Bidi":
            assert [part == value async for part in client.call(method, iter([value]))] == [True]
        else:
            assert await client.call(method, value) == value


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("method", [*UNARY, "ClientStream"])
async def test_a_message_over_the_limit_is_refused_with_the_limit(client: Client, method: str) -> None:
    value = bytes(MESSAGE_BYTES + 1)
    err = await client.fails(method, iter([value]) if method == "ClientStream" else value)
    assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MESSAGE_BYTES) in (err.details() or "")
    assert await client.call("Unary", b"next") == b"next"


@pytest.mark.usefixtures("large")
async def test_an_answer_over_the_limit_is_an_error(client: Client) -> None:
    err = await client.fails("Unary", order={"do": "size", "bytes": MESSAGE_BYTES + 1})
    assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await client.call("Unary", b"next") == b"next"


GZIP, DEFLATE = grpc.Compression.Gzip, grpc.Compression.Deflate


@OVER_TCP
async def test_a_small_request_that_unpacks_to_too_much_is_refused(front: Front, client: Client) -> None:
    short = {"tcp": [("Short", GZIP), ("Tasked", DEFLATE)], "envoy": [("Unary", GZIP)]}[front.transport]
    for method, kind in by_form(short, [*product(UNARY, (GZIP, DEFLATE))]):
        err = await client.fails(method, bytes(MESSAGE_BYTES + 1), compression=kind)
        assert err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_unknown_method_or_service_is_unimplemented(client: Client) -> None:
    for where in (f"/{NAME}/Nothing", "/no.such.Service/Unary", "/", "/x", f"/{NAME}/unary", f"/{NAME}/Unary/"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.channel.unary_unary(where)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_checked_and_watched(client: Client) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    for name in ("", NAME):
        asked = health_pb2.HealthCheckRequest(service=name)
        assert (await stub.Check(asked)).status == SERVING
        watch = stub.Watch(asked)
        assert (await watch.read()).status == SERVING
        watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_and_describes(client: Client) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME))
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


@pytest.mark.parametrize("method", UNARY)
async def test_two_thousand_concurrent_calls_on_one_connection(client: Client, method: str) -> None:
    calls = [client.call(method, str(n).encode(), {"do": "sleep", "ms": 20 + n % 50}) for n in range(2_000)]
    assert await asyncio.gather(*calls) == [str(n).encode() for n in range(2_000)]


async def test_two_hundred_connections(front: Front) -> None:
    connections = [front.raw() for _ in range(200)]
    await asyncio.gather(*(connection.__aenter__() for connection in connections))
    try:
        answers = await asyncio.gather(*(one_call(connection) for connection in connections))
        assert [answer.status for answer in answers] == [0] * 200
    finally:
        await asyncio.gather(*(connection.__aexit__(None, None, None) for connection in connections))


def one_call(connection: RawConnection):
    return connection.call("Unary", bytes(5))
