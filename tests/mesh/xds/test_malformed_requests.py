"""Requests that a real Envoy refuses by itself: each text names the cause and what to send, in the form of the call."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from mesh.xds.extensions import gateway_access
from services.coord.traffic import AT_GATEWAY
from shoal.access.rpc_groups import MODEL_INFER
from shoal.access.tokens import Signer
from shoal.errors import Code
from tests.access.policies import key, policy, signed
from tests.breakable import until
from tests.http2 import Answer, Connection, framed
from tests.mesh.xds.test_xds_access import Gateway
from tests.mesh.xds.test_xds_snapshot import infer

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

REVOKED = "k-revoked"
INFER = "/v2/models/m/infer"
JOBS = "/shoal/v1/jobs"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    """A gateway that reads the model of each call, since its instances have different ones."""
    # Paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = Gateway(folder, (infer(0, "a"), infer(1, "b")))
        await made.start(stack)
        made.source.access.set(gateway_access(policy(made.signer, revoked=[REVOKED]), AT_GATEWAY))

        async def is_admitted() -> bool:
            return (await call(made, key(made.signer).text)).status == Code.UNAVAILABLE

        await until(is_admitted, "the key is admitted")
        yield made
    shutil.rmtree(folder, ignore_errors=True)


async def call(
    gateway: Gateway,
    token: str | None,
    body: bytes = framed(b"\x0a\x01a"),
    more: tuple[tuple[bytes, bytes], ...] = (),
    scheme: str = "Bearer",
) -> Answer:
    """Make a gRPC call."""
    bearer = ((b"authorization", f"{scheme} {token}".encode()),) if token is not None else ()

    def whole() -> Answer:
        with Connection(gateway.envoy.gateway) as client:
            return client.call(body, MODEL_INFER, more=(*bearer, *more))

    return await asyncio.to_thread(whole)


async def http(gateway: Gateway, request: str) -> tuple[int, str, str]:
    """Send a request of HTTP/1.1; return the status, the type and the body of the response."""
    host, _, port = gateway.envoy.gateway.rpartition(":")

    def whole() -> bytes:
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(request.encode())
            found = b""
            while piece := client.recv(65_536):
                found += piece
            return found

    head, _, body = (await asyncio.to_thread(whole)).decode().partition("\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:])
    return int(head.split()[1]), headers.get("content-type", ""), body


def tokens_of(signer: Signer) -> list[tuple[str | None, int, str]]:
    now = int(time.time())
    good = key(signer).text
    return [
        (None, 401, "no key: send 'authorization: Bearer shoal_...' (`shoal keys create` makes a key)"),
        (signed(signer, exp=now - 100), 401, "the key has expired: send another one"),
        (signed(signer, nbf=now + 1_000), 401, "the token begins later: compare the clocks"),
        (signed(signer, iss="shoal:k-other"), 401, "the key is of another cluster"),
        (signed(signer, kid="other"), 401, "the token's signer is not among the keys of its issuer"),
        (good[:-6] + "AAAAAA", 401, "the signature is wrong"),
        ("shoal_garbage", 401, "send a whole key"),
        ("garbage", 401, "the header 'authorization' has no key"),
        (signed(signer, aud="other"), 403, "the token is for another audience"),
        (signed(signer, kid=None), 403, "the token has no id of its key"),
        (signed(signer, jti=REVOKED), 403, "the key is revoked"),
        (key(signer, role="viewer").text, 403, "the policy allows this call to no caller of this role"),
    ]


async def test_a_refused_token_is_told_why_over_grpc_rest_and_json(gateway: Gateway) -> None:
    codes = {401: Code.UNAUTHENTICATED, 403: Code.PERMISSION_DENIED}
    for token, status, words in tokens_of(gateway.signer):
        answer = await call(gateway, token)
        assert (answer.status, words in answer.message) == (codes[status], True), (words, answer.message)
        bearer = f"authorization: Bearer {token}\r\n" if token is not None else ""
        body = "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        end = f"host: localhost\r\n{bearer}connection: close\r\n{body}"
        found = await http(gateway, f"POST {INFER} HTTP/1.1\r\n{end}")
        assert (found[0], found[1]) == (status, "application/json"), found
        assert words in json.loads(found[2])["error"]
        found = await http(gateway, f"POST {JOBS} HTTP/1.1\r\n{end}")
        assert (found[0], found[1]) == (status, "application/json"), found
        error = json.loads(found[2])
        assert (error["code"], words in error["message"]) == (codes[status], True), error


async def test_the_scheme_has_any_case_and_no_other_scheme_is_taken(gateway: Gateway) -> None:
    good = key(gateway.signer).text
    for scheme in ("bearer", "BEARER", "bEaReR"):
        assert (await call(gateway, good, scheme=scheme)).status == Code.UNAVAILABLE, scheme
    for scheme in ("Basic", "Token", "x bearer", "bearers", "SHOAL", ""):
        answer = await call(gateway, good, scheme=scheme)
        assert answer.status == Code.UNAUTHENTICATED, scheme
        assert answer.message.startswith("the header 'authorization' has no key, or more than one: send one"), (
            answer.message
        )
    # A prefix is not the scheme's.
    assert (await call(gateway, good.upper())).status == Code.UNAUTHENTICATED


async def test_a_call_with_two_tokens_is_refused_in_any_order(gateway: Gateway) -> None:
    good = f"Bearer {key(gateway.signer).text}"
    for first, second in (("Bearer x", good), (good, "Bearer x"), (good, good), ("Basic x", good)):
        tokens = "".join(f"authorization: {value}\r\n" for value in (first, second))
        end = f"host: localhost\r\n{tokens}connection: close\r\ncontent-length: 2\r\n\r\n{{}}"
        status, _, body = await http(gateway, f"POST {INFER} HTTP/1.1\r\n{end}")
        assert (status, "or more than one: send one" in body) == (401, True), (first, second, body)
        more = ((b"authorization", second.encode()),)
        answer = await call(gateway, "", more=more, scheme=first)
        assert answer.status == Code.UNAUTHENTICATED, (first, second)


@pytest.mark.parametrize(
    "body",
    [
        b"\x05\x00\x00\x00\x01a",
        framed(b"abc", size=100),
        framed(b"\x0a\x01a", flags=1),
        b"",
    ],
)
async def test_a_malformed_message_is_the_callers_fault(gateway: Gateway, body: bytes) -> None:
    answer = await call(gateway, key(gateway.signer).text, body)
    assert answer.status == Code.INVALID_ARGUMENT, (answer.status, answer.message)
    assert answer.message


@pytest.mark.parametrize(
    "more",
    [
        (b"UPPER", b"x"),
        (b"a", b"x\r\ny"),
        (b"a", b"x\0y"),
        (b":path", b"/x"),
        (b"connection", b"close"),
        (b"te", b"gzip"),
    ],
)
async def test_a_malformed_request_of_http_2_costs_its_own_call_only(
    gateway: Gateway, more: tuple[bytes, bytes]
) -> None:
    bearer = (b"authorization", f"Bearer {key(gateway.signer).text}".encode())

    def whole() -> tuple[Answer, Answer]:
        with Connection(gateway.envoy.gateway) as client:
            refused = client.call(framed(b""), MODEL_INFER, more=(bearer, more))
            return refused, client.call(framed(b"\x0a\x01a"), MODEL_INFER, more=(bearer,))

    refused, after = await asyncio.to_thread(whole)
    assert (refused.is_cut, refused.status in (None, Code.UNAVAILABLE)) == (False, True)
    assert (after.is_cut, after.status) == (False, Code.UNAVAILABLE)


async def test_malformed_requests_of_http_1_are_told_why(gateway: Gateway) -> None:
    bearer = f"authorization: Bearer {key(gateway.signer).text}\r\n"
    many = "".join(f"h{number}: x\r\n" for number in range(300))
    for request, status, words in (
        ("NONSENSE\r\n\r\n", 400, "malformed request: Bad Request (http1.codec_error)"),
        ("GET /v2 HTTP/1.1\r\nconnection: close\r\n\r\n", 400, "the header 'host' is missing"),
        (
            f"POST {INFER} HTTP/1.1\r\nhost: a\r\n{bearer}transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
            400,
            "(http1.content_length_and_chunked_not_allowed)",
        ),
        (f"GET /v2#x HTTP/1.1\r\nhost: a\r\n{bearer}\r\n", 400, "a path has no '#'"),
        (
            f"GET /v2 HTTP/1.1\r\nhost: a\r\n{bearer}connection: upgrade\r\nupgrade: websocket\r\n\r\n",
            403,
            "this server upgrades no connection",
        ),
        (f"GET /v2 HTTP/1.1\r\nhost: a\r\n{many}\r\n", 431, "send fewer or shorter headers (docs/limits.md)"),
        (f"GET /nothing HTTP/1.1\r\nhost: a\r\n{bearer}connection: close\r\n\r\n", 403, "or there is no such call"),
    ):
        found = await http(gateway, request)
        assert (found[0], words in found[2]) == (status, True), found
