"""Attacks by the form of a call: gRPC-Web bodies, content types, preflights, paths, targets and host names.

Each is decided as the plain call is, by real Envoys and services: acme may not call `secret`, and globex may.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest

from services.coord import traffic
from shoal.access import tokens
from shoal.access.decision import caller_of, decide
from shoal.access.policy import Policy
from shoal.access.rpc_groups import GROUP_OF, INTERNAL, MODEL_INFER, MODEL_STREAM_INFER, ROLL_BACK
from shoal.errors import ERROR_CODE_PARAMETER, Code
from shoal.inference.v2 import inference_pb2 as pb
from tests.http2 import Connection, Silence, connected, framed, raw
from tests.infer.conftest import request
from tests.node.test_access_attacks import (
    FOREIGN,
    OPEN,
    PAGE,
    PATIENCE_S,
    SECRET,
    WEB,
    WEB_TEXT,
    NodeWorld,
    World,
    X,
    code_of,
    node_world,  # noqa: F401 - fixtures.
    page,
    preflight,
    serve_world,  # noqa: F401
    web,
    world,  # noqa: F401
)

pytestmark = [pytest.mark.timeout(300)]

ANSWER = np.array([2, 4, 6, 8], np.float32).tobytes()
INFERENCE = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()


def message(model: str) -> bytes:
    return request(model, x=X).SerializeToString()


def encoded(body: bytes, kind: str) -> bytes:
    return base64.b64encode(body) if "-text" in kind else body


def bearer(token: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {token}".encode()


# gRPC-Web.

BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "two messages": (framed(message(OPEN)) + framed(message(SECRET)), {}),
    "a name twice": (framed(message(OPEN) + pb.ModelInferRequest(model_name=SECRET).SerializeToString()), {}),
    "trailers behind it": (framed(message(SECRET)) + framed(b"x-shoal-tenant: globex\r\n", flags=0x80), {}),
    "trailers before it": (framed(b"x-shoal-tenant: globex\r\n", flags=0x80) + framed(message(SECRET)), {}),
    "trailers alone": (framed(b"grpc-status: 0\r\n", flags=0x80), {}),
    "compressed": (framed(gzip.compress(message(SECRET)), flags=1), {"grpc-encoding": "gzip"}),
    "compressed, which it does not say": (framed(gzip.compress(message(SECRET)), flags=1), {}),
    "compressed, which it is not": (framed(message(SECRET), flags=1), {"grpc-encoding": "gzip"}),
    "compressed as a whole": (gzip.compress(framed(message(SECRET))), {"content-encoding": "gzip"}),
    "cut": (framed(message(OPEN))[:-1], {}),
    "longer": (framed(message(OPEN)) + b"\0", {}),
    "of another size": (framed(message(OPEN), size=(1 << 32) - 1), {}),
    "empty": (b"", {}),
}


@pytest.mark.parametrize("kind", [WEB, WEB_TEXT])
@pytest.mark.parametrize("name", BODIES)
def test_an_odd_body_over_grpc_web_is_refused_as_over_grpc(world: World, name: str, kind: str) -> None:  # noqa: F811
    body, headers = BODIES[name]
    key = world.key().text
    _, _, outcome, messages = web(world, key, encoded(body, kind), kind=kind, more=headers)
    with Connection(world.address) as client:
        more = [(name.encode(), value.encode()) for name, value in headers.items()]
        found = client.call(body, more=[bearer(key), *more])
    assert outcome.split(" ")[0] == str(found.status), (outcome, found.message)
    assert found.status != 0
    assert messages == []


@pytest.mark.parametrize("kind", [WEB, WEB_TEXT])
def test_each_message_of_a_stream_over_grpc_web_is_decided(world: World, kind: str) -> None:  # noqa: F811
    body = b"".join(framed(message(name)) for name in (OPEN, SECRET, OPEN))
    _, _, outcome, messages = web(world, world.key().text, encoded(body, kind), path=MODEL_STREAM_INFER, kind=kind)
    answers = [pb.ModelStreamInferResponse.FromString(one).infer_response for one in messages]
    codes = [answer.parameters[ERROR_CODE_PARAMETER].int64_param for answer in answers]
    assert (outcome, codes) == ("0", [0, Code.PERMISSION_DENIED, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", [WEB, WEB_TEXT])
def test_a_body_that_is_cut_anywhere_is_the_same_call(world: World, kind: str, size: int) -> None:  # noqa: F811
    for model, code in ((OPEN, "0"), (SECRET, "7")):
        body = encoded(framed(message(model)), kind)
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        _, _, outcome, messages = web(world, world.key().text, pieces, kind=kind)
        assert outcome.split(" ")[0] == code, outcome
        assert len(messages) == (model == OPEN)


def test_text_that_is_no_base64_reaches_no_model(world: World) -> None:  # noqa: F811
    known, secret = (framed(message(name)) for name in (OPEN, SECRET))
    whole = base64.b64encode(known)
    # A text of two parts is one of gRPC-Web, each with its own padding.
    for body in (secret, b"!" * 64, whole[:-5], whole[:-1], b"=" + whole, whole.replace(b"A", b"-"), b"\0" + whole):
        _, _, outcome, messages = web(world, world.key().text, body, kind=WEB_TEXT)
        assert (outcome[:2].strip() != "0", messages) == (True, []), body
    parts = base64.b64encode(secret[:7]) + base64.b64encode(secret[7:])
    assert web(world, world.key().text, parts, kind=WEB_TEXT)[2].split(" ")[0] != "0"
    assert web(world, world.key().text, whole, kind=WEB_TEXT)[2] == "0"


@pytest.mark.parametrize(
    "kind",
    [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc-web+json",
        "application/grpc-web+thrift",
        "application/grpc-web-text+json",
        "Application/gRPC-Web+Proto",
        "application/grpc-web+proto; charset=utf-8",
        "application/grpc-web,application/grpc",
        "application/json",
        "text/plain",
        "",
    ],
)
def test_another_content_type_gives_no_more_rights(world: World, kind: str) -> None:  # noqa: F811
    for token, model in ((None, OPEN), (world.key().text, SECRET), (world.key(role="viewer").text, OPEN)):
        connection = http.client.HTTPConnection(world.address, timeout=PATIENCE_S)
        try:
            for text in (False, True):
                body = framed(message(model))
                headers = {"content-type": kind} | ({"authorization": f"Bearer {token}"} if token else {})
                connection.request("POST", MODEL_INFER, base64.b64encode(body) if text else body, headers)
                answer = connection.getresponse()
                sent = answer.read()
                assert ANSWER not in sent
                assert base64.b64encode(ANSWER)[:8] not in sent
                assert answer.headers.get("grpc-status") != "0"
        finally:
            connection.close()


def test_grpc_web_over_http_2_and_with_many_headers(world: World) -> None:  # noqa: F811
    for model, token, expected in ((OPEN, world.key().text, True), (SECRET, world.key().text, False)):
        with Connection(world.address) as client:
            found = client.call(
                encoded(framed(message(model)), WEB_TEXT), change={"content-type": WEB_TEXT}, more=[bearer(token)]
            )
        assert (found.http_status == 200 and found.status is None) is expected, found
    # What Envoy adds counts for no client.
    status, _, _, messages = web(
        world, world.key().text, framed(message(OPEN)), more={f"h{n}": "x" for n in range(245)}
    )
    assert (status, len(messages)) == (200, 1)
    many = {f"h{number}": "x" * 300 for number in range(250)}
    for headers in (many, {"cookie": "c=" + "x" * (70 << 10)}, {f"n{number}": "" for number in range(400)}):
        try:
            status = web(world, world.key().text, framed(message(OPEN)), more=headers)[0]
        except (http.client.HTTPException, ConnectionError):
            continue
        assert status == 431


def test_a_preflight_reaches_no_service_and_two_origins_are_none(world: World) -> None:  # noqa: F811
    key = world.key("globex", "admin").text
    with world.with_policy(cors={"origins": [PAGE]}):
        world.until(lambda: page(world, world.key().text, origin=PAGE)[0] == 200)
        asked = {"origin": PAGE, "access-control-request-method": "POST"}
        for path in (MODEL_INFER, "/v2/models/open/infer", ROLL_BACK):
            status, headers, outcome, messages = web(
                world, key, framed(message(OPEN)), path=path, method="OPTIONS", more=asked
            )
            assert (status, outcome, messages) == (200, "", []), path
            assert headers["access-control-allow-origin"] == PAGE
        # No preflight: it has a token, or needs one.
        assert web(world, None, b"", method="OPTIONS", more={"origin": PAGE})[0] == 401
        assert web(world, None, b"", method="OPTIONS", more={"access-control-request-method": "POST"})[0] == 401
        for origin in (
            PAGE.upper(),
            f"{PAGE}/",
            f"{PAGE}.",
            f"{PAGE},{FOREIGN}",
            f"{FOREIGN} {PAGE}",
            f" {PAGE}x",
            "*",
        ):
            assert page(world, world.key().text, origin=origin)[0] == 403, origin
            assert "access-control-allow-origin" not in preflight(world, origin)[1], origin
        head = f"POST {MODEL_INFER} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-type: {WEB}\r\n"
        two = f"{head}origin: {PAGE}\r\norigin: {FOREIGN}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        assert raw(world.address, two.encode(), half_closes=False).startswith(b"HTTP/1.1 403 ")
        with Connection(world.address) as client:
            found = client.call(more=[bearer(key), (b"origin", PAGE.encode()), (b"origin", FOREIGN.encode())])
        assert (found.status, found.data) == (Code.PERMISSION_DENIED, b"")


# Paths, targets and host names, over HTTP/1.1 and HTTP/2.

Send = Callable[[World, str, str | None, Mapping[str, str]], tuple[int, bytes]]


def over_http_1(world: World, target: str, token: str | None, headers: Mapping[str, str]) -> tuple[int, bytes]:  # noqa: F811
    """Send an inference to a target as it is; return the status and the body; 0: the connection ended."""
    lines = {"host": world.address, "content-type": "application/json", "connection": "close", **headers}
    if token:
        lines["authorization"] = f"Bearer {token}"
    lines["content-length"] = str(len(INFERENCE))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    sent = f"POST {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + INFERENCE
    with connected(world.address) as sock:
        sock.sendall(sent)
        answer = http.client.HTTPResponse(sock, method="POST")
        try:
            answer.begin()
            return answer.status, answer.read()
        except TimeoutError as err:
            raise Silence(f"no response to {target!r}, {headers}") from err
        except (http.client.HTTPException, OSError):
            return 0, b""


def over_http_2(world: World, target: str, token: str | None, headers: Mapping[str, str]) -> tuple[int, bytes]:  # noqa: F811
    """Send as `over_http_1` does; the host is `:authority`, and `host-field` a field beside it."""
    fields = dict(headers)
    change = {"te": None, "content-type": "application/json", ":authority": fields.pop("host", world.address)}
    more = [(name.removesuffix("-field").encode(), value.encode()) for name, value in fields.items()]
    if token:
        more.append(bearer(token))
    with Connection(world.address) as client:
        found = client.call(INFERENCE, path=target, change=change, more=more)
    return found.http_status or 0, found.data


SENDS = pytest.mark.parametrize("send", [over_http_1, over_http_2])

TARGETS = [
    "/v2/models/{secret}/infer",
    "/v2/models/{encoded}/infer",
    "/v2/models/{twice}/infer",
    "/v2/models/{open}/../{secret}/infer",
    "/v2/models/{open}/..%2f{secret}/infer",
    "/v2/models/{open}%2f..%2f{secret}/infer",
    "/v2/models/{open}%5c..%5c{secret}/infer",
    "/v2/models/{open}\\..\\{secret}\\infer",
    "/v2/models/{open}/infer/../../{secret}/infer",
    "/v2/models/{open}/versions/../../{secret}/infer",
    "/v2/models/{secret}/versions/1/infer",
    "/v2/models/{secret}/versions/1%2f/infer",
    "/v2/./models/{secret}/infer",
    "/v2//models/{secret}/infer",
    "//v2/models/{secret}/infer",
    "/v2/models//{secret}/infer",
    "/v2/models/{secret}//infer",
    "/v2/models/{secret}/infer/",
    "/v2/models/{secret};x=1/infer",
    "/v2/models/{secret}/infer;x=1",
    "/v2/models/{secret}/infer?model_name={open}",
    "/v2/models/{open}?/../{secret}/infer",
    "/v2/models/{open}#/../{secret}/infer",
    "/v2/models/{secret}/infer#/v2/models/{open}/infer",
    "/v2/models/{secret}%00/infer",
    "/v2/models/{secret}%20/infer",
    "/v2/models/{secret}./infer",
    "/v2/models/%{secret}/infer",
    "/v2/models/{secret}%/infer",
    "/v2/models/{secret}%c0%80/infer",
    "/%76%32/models/{secret}/infer",
    "/v2/%6dodels/{secret}/infer",
    "/v2/models/{secret}/%69nfer",
    "/V2/models/{secret}/infer",
    "/v2/models/{secret}/INFER",
    "/v2/health/live/../../models/{secret}/infer",
    "http://{address}/v2/models/{secret}/infer",
    "http://evil.example/v2/models/{secret}/infer",
    "http://{address}/v2/models/{open}/../{secret}/infer",
    "*",
    "v2/models/{secret}/infer",
    "",
]


def filled(target: str, to: World) -> str:
    once = "".join(f"%{ord(letter):02x}" for letter in SECRET)
    names = {"secret": SECRET, "open": OPEN, "encoded": once, "twice": once.replace("%", "%25"), "address": to.address}
    return target.format(**names)


@SENDS
@pytest.mark.parametrize("prefer", [None, "respond-async"])
def test_no_form_of_a_path_reaches_a_model_that_one_may_not_call(world: World, send: Send, prefer: str | None) -> None:  # noqa: F811
    headers = {"prefer": prefer} if prefer else {}
    acme, viewer = world.key().text, world.key("globex", "viewer").text
    for target, token in product(TARGETS, (acme, viewer, None)):
        status, body = send(world, filled(target, world), token, headers)
        # A job may be for a model that does not exist. Its name was decoded once.
        if status == 202 and token == acme:
            assert json.loads(body)["job"]["model_name"] != SECRET, target
            continue
        assert status not in (200, 202), (target, token, body)
        assert status < 500, (target, status, body)
    globex = world.key("globex").text
    served = {200} if prefer is None or not isinstance(world, NodeWorld) else {202}
    for target in ("/v2/models/{secret}/infer", "/v2/models/{encoded}/infer", "/v2/models/{secret}/versions/1/infer"):
        assert {send(world, filled(target, world), globex, headers)[0]} == served, target


@SENDS
def test_no_form_of_a_host_passes_for_a_name_of_the_policy(world: World, send: Send) -> None:  # noqa: F811
    key, path = world.key().text, f"/v2/models/{OPEN}/infer"
    with world.with_policy(hosts=["ai.example", world.address.rpartition(":")[0]]):
        world.until(lambda: send(world, path, key, {"host": "evil.example"})[0] == 421)
        assert send(world, path, key, {"host": "ai.example"})[0] == 200
        for host in (
            "ai.example.evil.example",
            "evil.example:80:ai.example",
            "ai.example@evil.example",
            "evil.example#ai.example",
            "evil.example?ai.example",
            "evil.example/ai.example",
            "evil.example\\ai.example",
            "evil.example, ai.example",
            "ai.example.",
            "xai.example",
            "*",
            "",
        ):
            assert send(world, path, key, {"host": host})[0] in (0, 400, 404, 421), host
        if send is over_http_1:
            # The target counts, and not the header (RFC 9112, section 3.2.2).
            assert send(world, f"http://evil.example{path}", key, {"host": "ai.example"})[0] == 421
            assert send(world, path, key, {"host": "ai.example\r\nhost: evil.example"})[0] in (400, 421)
            assert send(world, path, key, {"host": "evil.example", "x-forwarded-host": "ai.example"})[0] == 421
        else:
            for more in ({"host-field": "ai.example"}, {"x-forwarded-host": "ai.example"}):
                assert send(world, path, key, {"host": "evil.example", **more})[0] in (0, 400, 421), more


# The groups of RPCs.

SERVICES = (traffic.STORE, traffic.INGEST, traffic.COORD, traffic.INFER, traffic.BULK, traffic.TRIALS, traffic.HEALTH)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in (*SERVICES, traffic.ACCESS, traffic.SHARES, traffic.SPANS)
    for method in service.methods
}


def test_every_rpc_of_a_node_is_decided_as_it_is_explained(node_world: NodeWorld) -> None:  # noqa: F811
    """An empty message to each RPC, by each role: who may not call is refused, and nobody else is."""
    with node_world.client() as client:
        found = Policy.model_validate_json(client.access.policy().in_force)
    assert METHODS.keys() == {rpc for rpc in GROUP_OF if "#" not in rpc and "eflection" not in rpc}
    wrong: list[Any] = []
    with node_world.channel() as channel:
        for role in ("viewer", "user", "publisher", "operator", "admin"):
            token = node_world.key("globex", role).text
            caller = caller_of(found, tokens.verified_claims(found, token, time.time()))
            for rpc, method in METHODS.items():
                allowed = decide(found, caller, rpc).allowed
                # A watch of somebody who may call does not end.
                if allowed and method.server_streaming:
                    continue
                code = code_of(channel.unary_unary(rpc), b"", (("authorization", f"Bearer {token}"),))
                is_refused = code == "PERMISSION_DENIED" or (GROUP_OF[rpc] == INTERNAL and code == "UNIMPLEMENTED")
                if is_refused is allowed:
                    wrong.append((role, rpc, code))
    assert wrong == []


def test_new_rpcs_are_explained_as_the_node_decides(node_world: NodeWorld) -> None:  # noqa: F811
    for call, role, expected in (
        ("GetHistory", "operator", 0),
        ("GetHistory", "user", 1),
        ("GetSpans", "viewer", 0),
        ("GetSpans#all", "user", 1),
        ("GetSpans#all", "operator", 0),
        ("ListSpans", "admin", 1),
        ("LogSettings", "operator", 0),
        ("LogSettings", "publisher", 1),
    ):
        token = node_world.key("globex", role).text
        done = node_world.node.shoal("policy", "explain", "--token", token, "--call", call, check=False)
        assert done.returncode == expected, (call, role, done.stdout, done.stderr)
