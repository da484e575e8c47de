"""Requests that no library sends: the server ends them with a status, and continues."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from mesh.rpc.limits import MESSAGE_BYTES
from shoal.errors import Code
from tests.breakable import until
from tests.http2 import framed
from tests.mesh.rpc.fronts.conftest import UNARY, Client, Front
from tests.mesh.rpc.fronts.raw import RawConnection

X = b"\x0a\x01x"
"""BytesValue(value=b"x")."""


@pytest.mark.parametrize("method", UNARY)
async def test_a_whole_message_by_single_bytes(raw: RawConnection, method: str) -> None:
    number = await raw.open(method)
    for byte in framed(X):
        await raw.send(number, bytes([byte]))
    await raw.send(number, b"", end=True)
    answer = await raw.ended(number)
    assert (answer.status, answer.data) == (0, framed(X))


@pytest.mark.parametrize("method", UNARY)
async def test_a_body_may_come_much_later_than_its_headers(raw: RawConnection, client: Client, method: str) -> None:
    number = await raw.open(method)
    await client.call("Unary", order={"do": "sleep", "ms": 300})  # Longer than any timer of the server.
    await raw.send(number, framed(X)[:3])
    await client.call("Unary", order={"do": "sleep", "ms": 150})
    await raw.send(number, framed(X)[3:], end=True)
    answer = await raw.ended(number)
    assert (answer.status, answer.data) == (0, framed(X))


@pytest.mark.parametrize("method", UNARY)
async def test_empty_frames_are_nothing(raw: RawConnection, method: str) -> None:
    number = await raw.open(method)
    for data in (b"", framed(X), b"", b""):
        raw._h2.send_data(number, data)
        await raw.flush()
    await raw.send(number, b"", end=True)
    assert (await raw.ended(number)).status == 0


@pytest.mark.parametrize("method", UNARY)
@pytest.mark.parametrize(
    ("body", "codes"),
    [
        (b"", {Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNIMPLEMENTED, Code.CANCELLED}),
        (b"\0", {Code.INVALID_ARGUMENT, Code.INTERNAL, Code.CANCELLED}),
        (framed(X)[:-1], {Code.INVALID_ARGUMENT, Code.INTERNAL, Code.CANCELLED}),
        (framed(X) + framed(X), {Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNIMPLEMENTED, Code.OK}),
        (framed(X) + b"\0", {Code.INVALID_ARGUMENT, Code.INTERNAL, Code.CANCELLED, Code.OK}),
        (framed(X, flags=2), {Code.INVALID_ARGUMENT, Code.INTERNAL}),
        (framed(X, flags=1), {Code.INVALID_ARGUMENT, Code.INTERNAL}),
        (framed(b"\xff\xff\xff"), {Code.INVALID_ARGUMENT}),
        (b"\0\xff\xff\xff\xff", {Code.RESOURCE_EXHAUSTED}),
    ],
    ids=["nothing", "a byte", "cut", "two", "rest", "flags", "not compressed", "no message", "4 GB"],
)
async def test_bodies_that_are_not_one_message(
    raw: RawConnection, client: Client, method: str, body: bytes, codes: set[Code]
) -> None:
    answer = await raw.call(method, body)
    assert answer.status in codes or (answer.status is None and answer.reset is not None)
    assert await client.call(method, b"next") == b"next"


@pytest.mark.parametrize("method", UNARY)
async def test_headers_alone(raw: RawConnection, method: str) -> None:
    number = await raw.open(method, end=True)
    answer = await raw.ended(number)
    assert answer.status not in (None, 0) or answer.reset is not None


@pytest.mark.parametrize("method", UNARY)
@pytest.mark.parametrize(
    ("encoding", "body", "codes"),
    [
        ("gzip", framed(gzip.compress(X, mtime=0), 1), {0}),
        ("deflate", framed(zlib.compress(X), 1), {0}),
        ("gzip", framed(X, 0), {0}),
        ("identity", framed(X), {0}),
        ("br", framed(X, 1), {Code.UNIMPLEMENTED, Code.INTERNAL}),
        ("gzip", framed(b"no gzip", 1), {Code.INVALID_ARGUMENT, Code.INTERNAL}),
        ("gzip", framed(gzip.compress(X, mtime=0)[:-9], 1), {Code.INVALID_ARGUMENT, Code.INTERNAL}),
    ],
)
async def test_compression_follows_the_header(
    raw: RawConnection, method: str, encoding: str, body: bytes, codes: set[int]
) -> None:
    answer = await raw.call(method, body, grpc_encoding=encoding)
    assert answer.status in codes


@pytest.mark.parametrize("method", UNARY)
@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/grpc-web", "application/grpcx"])
async def test_another_content_type_is_refused_by_http(
    raw: RawConnection, front: Front, method: str, kind: str
) -> None:
    answer = await raw.call(method, framed(X), content_type=kind)
    if front.transport == "envoy" and kind == "application/grpc-web":
        # Envoy translates it, and the status is in the body.
        assert answer.headers["content-type"].startswith(kind)
        return
    assert (answer.headers.get(":status") == "415" and not answer.status) or answer.status not in (0, None)


@pytest.mark.parametrize("kind", ["application/grpc+proto", "application/grpc; charset=utf-8"])
@pytest.mark.parametrize("method", UNARY)
async def test_content_types_of_grpc_are_accepted(raw: RawConnection, method: str, kind: str) -> None:
    assert (await raw.call(method, framed(X), content_type=kind)).status == 0


@pytest.mark.parametrize("method", UNARY)
async def test_a_get_is_no_call(raw: RawConnection, client: Client, method: str) -> None:
    number = await raw.open(method, end=True, verb="GET")
    answer = await raw.ended(number)
    assert answer.status != 0
    assert await client.call(method, b"next") == b"next"


@pytest.mark.parametrize("method", UNARY)
async def test_without_te_there_is_an_end(raw: RawConnection, client: Client, method: str) -> None:
    number = await raw.open(method, without="te")
    await raw.send(number, framed(X), end=True)
    await raw.ended(number)
    assert await client.call(method, b"next") == b"next"


@pytest.mark.parametrize("method", UNARY)
@pytest.mark.parametrize("value", ["", "1", "S", "-1S", "1x", "999999999S", "1.5S", " 1S"])
async def test_a_timeout_that_is_none(raw: RawConnection, client: Client, method: str, value: str) -> None:
    answer = await raw.call(method, framed(X), grpc_timeout=value)
    assert answer.status is not None or answer.reset is not None
    assert await client.call(method, b"next") == b"next"


@pytest.mark.parametrize("value", ["***", "AAA=AA", "A"])
async def test_binary_metadata_that_is_no_base64(raw: RawConnection, client: Client, value: str) -> None:
    answer = await raw.call("Unary", framed(X), {"do": "metadata"}, x_a_bin=value)
    assert answer.status is not None or answer.reset is not None
    assert await client.call("Unary", b"next") == b"next"


async def test_binary_metadata_with_and_without_padding(raw: RawConnection) -> None:
    for value in ("AQ", "AQ=="):
        answer = await raw.call("Unary", framed(X), {"do": "metadata"}, x_a_bin=value)
        assert (answer.status, answer.headers["x-a-bin"].rstrip("="), answer.trailers["x-a-bin"].rstrip("=")) == (
            0,
            "AQ",
            "AQ",
        )


async def test_a_stream_that_ends_inside_a_message_is_an_error(raw: RawConnection) -> None:
    for method in ("ClientStream", "Bidi"):
        answer = await raw.call(method, framed(X) + framed(X)[:-1])
        assert answer.status not in (0, None) or answer.reset is not None


async def test_a_request_that_is_too_large_is_refused_from_its_prefix(raw: RawConnection) -> None:
    for method in ("Unary", "Short", "ClientStream"):
        number = await raw.open(method)
        await raw.send(number, b"\0" + (MESSAGE_BYTES + 1).to_bytes(4) + bytes(100))
        answer = await raw.ended(number)
        assert answer.status == Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", UNARY)
async def test_random_bytes_end_nothing(front: Front, client: Client, method: str) -> None:
    noise = bytes((n * 7919) % 251 for n in range(5_000))

    async def send(at: int) -> None:
        async with front.raw() as connection:
            connection._writer.write(noise[at : at + 900])
            await connection._writer.drain()
            if at % 3:
                connection.cut()
            else:
                await asyncio.wait_for(connection.closed.wait(), 30)

    await asyncio.gather(*(send(at) for at in range(0, 4_000, 97)))
    assert await client.call(method, b"next") == b"next"


@pytest.mark.parametrize("method", UNARY)
async def test_many_streams_opened_and_reset_immediately(front: Front, client: Client, method: str) -> None:
    for _ in range(5):
        async with front.raw() as connection:
            numbers = [await connection.open(method, {"do": "wait"}) for _ in range(90)]
            for number in numbers[::2]:
                await connection.send(number, framed(X), end=True)
            for number in numbers:
                if not connection.closed.is_set():
                    await connection.reset(number)
    assert await client.call(method, b"next") == b"next"


async def test_a_client_that_does_not_read_a_long_stream_costs_little(front: Front, client: Client) -> None:
    before = rss_kb(front.pid)
    order = {"do": "size", "bytes": 100_000, "count": 2_000, "mark": "unread"}
    async with RawConnection(front.address, reads=False) as connection:
        number = await connection.open("ServerStream", order)
        await connection.send(number, framed(X), end=True)
        last: list[int] = []

        async def is_held() -> bool:
            """Whether no more is being sent."""
            seen = json.loads(await client.call("Seen"))
            last.append(sum(event.startswith("sent unread") for event in seen))
            return len(last) > 25 and len(set(last[-20:])) == 1 and last[-1] > 0

        await until(is_held, "the stream held back", every_s=0.05)
        assert last[-1] < 1_500
        assert rss_kb(front.pid) - before < 100 << 10
    assert await client.call("Unary", b"next") == b"next"


async def test_a_client_that_sends_more_than_is_read_costs_little(front: Front, client: Client) -> None:
    before = rss_kb(front.pid)
    async with front.raw() as raw:
        number = await raw.open("ClientStream", {"do": "echo", "mark": "unread"})
        sending = asyncio.create_task(send_much(raw, number))
        await client.until_seen("started unread")
        for _ in range(50):  # While it could take more.
            await client.call("Unary", b"x" * 1_000, {"do": "sleep", "ms": 10})
        assert not sending.done()
        assert rss_kb(front.pid) - before < 250 << 10  # Half of it: grpc's windows grow when a machine is slow.
        sending.cancel()
        await asyncio.wait([sending])
    assert await client.call("Unary", b"next") == b"next"


async def send_much(raw: RawConnection, number: int) -> None:
    message = framed(BytesValue(value=bytes(10 << 20)).SerializeToString())
    for _ in range(50):
        await raw.send(number, message)


def rss_kb(pid: int) -> int:
    """Return the resident memory of a process and its children: behind Envoy, that of both."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return sum(int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text())[0]) for one in pids)
