"""Deadlines and disconnects: the server enforces deadlines itself, and notifies handlers of disconnected clients."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import grpc
import pytest

from shoal.errors import Code
from tests.breakable import until
from tests.http2 import framed
from tests.mesh.rpc.fronts.conftest import UNARY, Client, Front
from tests.mesh.rpc.fronts.raw import RawConnection

EACH = ("Unary", "Short", "Tasked", "ServerStream", "ClientStream", "Bidi")
_numbers = itertools.count()


def mark(name: str) -> str:
    return f"{name}-{next(_numbers)}"


async def silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def one_and_silence() -> AsyncIterator[bytes]:
    yield b"x"
    await asyncio.Event().wait()


@pytest.mark.parametrize("method", EACH)
async def test_the_server_enforces_the_deadline(raw: RawConnection, client: Client, method: str) -> None:
    which = mark("deadline")
    # In one write: a message that comes later than its deadline reaches no handler.
    end = method not in ("ClientStream", "Bidi")
    number = await raw.open(method, {"do": "wait", "mark": which}, body=framed(b""), end=end, grpc_timeout="300m")
    answer = await raw.ended(number)
    assert answer.status == Code.DEADLINE_EXCEEDED
    await client.until_seen(f"cancelled {which}")


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("given", ["0m", "1n", "1u"])
async def test_a_deadline_that_is_over_ends_the_call(
    raw: RawConnection, client: Client, method: str, given: str
) -> None:
    number = await raw.open(method, {"do": "wait"}, grpc_timeout=given)
    answer = await raw.ended(number) if method in ("ClientStream", "Bidi") else None
    if answer is None:
        await raw.send(number, framed(b""), end=True)
        answer = await raw.ended(number)
    assert answer.status == Code.DEADLINE_EXCEEDED
    assert await client.call("Unary", b"next") == b"next"


@pytest.mark.parametrize("method", UNARY)
async def test_the_deadline_holds_while_the_request_is_still_coming(
    front: Front, raw: RawConnection, method: str
) -> None:
    number = await raw.open(method, grpc_timeout="200m")
    await raw.send(number, framed(b"")[:2])
    answer = await raw.ended(number)
    assert answer.status == Code.DEADLINE_EXCEEDED


async def test_the_handler_knows_the_remaining_time(client: Client) -> None:
    # A client may round its timeout up.
    assert 0 < float(await client.call("Unary", order={"do": "left"}, timeout=5_000)) < 5_100
    assert await client.call("Unary", order={"do": "left"}) == b"None"


@pytest.mark.parametrize("method", EACH)
async def test_a_client_that_cancels_reaches_the_handler(client: Client, method: str) -> None:
    which = mark("cancel")
    request = one_and_silence() if method in ("ClientStream", "Bidi") else b"x"
    call = client.call(method, request, {"do": "wait", "mark": which})
    if method not in ("ServerStream", "Bidi"):
        waiting = asyncio.ensure_future(_result(call))
    await client.until_seen(f"started {which}")
    call.cancel()
    if method not in ("ServerStream", "Bidi"):
        await asyncio.wait([waiting])
    await client.until_seen(f"cancelled {which}")


async def _result(call):
    try:
        return await call
    except asyncio.CancelledError:
        return None


@pytest.mark.parametrize("method", EACH)
async def test_a_connection_that_is_cut_reaches_the_handler(front: Front, client: Client, method: str) -> None:
    which = mark("cut")
    async with front.raw() as raw:
        number = await raw.open(method, {"do": "wait", "mark": which})
        await raw.send(number, framed(b""), end=method not in ("ClientStream", "Bidi"))
        await client.until_seen(f"started {which}")
        raw.cut()
    await client.until_seen(f"cancelled {which}")


async def test_a_bidi_that_waits_for_its_client_hears_of_its_end(front: Front, client: Client) -> None:
    which = mark("quiet")
    async with front.raw() as raw:
        number = await raw.open("Bidi", {"do": "echo", "mark": which})
        await raw.send(number, framed(b""))
        await until(lambda: bool(raw.streams[number].data), "its first answer")  # It runs, so it can hear of an end.
        await raw.reset(number)
        await client.until_seen(f"cancelled {which}")


@pytest.mark.parametrize("method", UNARY)
async def test_a_thousand_waiting_calls_are_all_cancelled(front: Front, client: Client, method: str) -> None:
    which = mark("many")
    async with front.raw() as raw:
        numbers = [await raw.open(method, {"do": "wait", "mark": f"{which}.{n}"}) for n in range(80)]
        for number in numbers:
            await raw.send(number, framed(b""), end=True)
        await client.until_seen(*(f"started {which}.{n}" for n in range(80)))
        raw.cut()
    await client.until_seen(*(f"cancelled {which}.{n}" for n in range(80)))


async def test_a_call_may_wait_longer_than_any_default(client: Client) -> None:
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.5):
            await client.call("Unary", order={"do": "wait"})
    err = await client.fails("Unary", order={"do": "wait"}, timeout=0.2)
    assert err.code() is grpc.StatusCode.DEADLINE_EXCEEDED
