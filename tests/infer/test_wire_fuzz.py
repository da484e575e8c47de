"""Requests that no client sends, on the wire, to a process as it is served: it refuses them by name and lives on.

SHOAL_TEST_FRONTS=h2,envoy picks the fronts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import Code
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.http2 import INFER, STREAM, Answer, Connection, framed, raw
from tests.infer import onnx_files
from tests.infer.conformance.instance import FRONTS, Instance
from tests.infer.conftest import Repository, floats, output, request
from tests.infer.mutation import mutated
from tests.long_form import by_form

X = floats([1, 2, 3, 4])
GOOD = request("double", x=X).SerializeToString()
ZIPPED = gzip.compress(GOOD)
BOMB = gzip.compress(bytes(160 << 20), 1)
GZIP = {"grpc-encoding": "gzip"}

ROOM_BYTES = 96 << 20
"""What the memory of a process may grow by, once it has seen everything once."""


class Target:
    """A served process, and the Envoy in front of it."""

    def __init__(self, instance: Instance) -> None:
        self.address = instance.address
        self.pids = [instance.pid, *([instance.envoy] if instance.envoy else [])]

    def check(self) -> None:
        """It lives, and a good request gets its right response."""
        assert all(Path(f"/proc/{pid}").exists() for pid in self.pids)
        with Connection(self.address) as connection:
            response = connection.call(framed(GOOD))
        assert response.status == 0, response
        np.testing.assert_array_equal(output(pb.ModelInferResponse.FromString(response.messages[0]), "y"), 2 * X)

    def rss(self) -> int:
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        return pages * os.sysconf("SC_PAGESIZE")

    def descriptors(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids)


@pytest.fixture(scope="module", params=os.environ.get("SHOAL_TEST_FRONTS", ",".join(FRONTS)).split(","))
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("wire")
    models = Repository(folder / "models")
    models.bare("double", onnx_files.scale())
    models.bare("any", onnx_files.identity(dims=("n", "k")))
    with Instance.serving(models.root, folder / "infer.log", front=request.param) as instance:
        yield Target(instance)
    assert instance.process.returncode == 0
    faults = [line for line in (folder / "infer.log").read_text().splitlines() if "Traceback" in line]
    assert not faults, faults[:3]


@pytest.fixture(autouse=True)
def lives_on(target: Target) -> Iterator[None]:
    yield
    target.check()


def end_of_call(target: Target, **sent: object) -> str:
    """Return the end of a call in one word: the name of its status, `HTTP 415`, `reset` or `cut`."""
    try:
        with Connection(target.address) as connection:
            response = connection.call(**sent)
    except OSError:
        return "cut"
    return end_of(response, target)


def end_of(response: Answer, target: Target) -> str:
    if response.status is not None:
        assert response.status == 0 or response.message, response
        return Code(response.status).name
    if response.http_status is not None and response.http_status != 200:
        return f"HTTP {response.http_status}"
    return "reset" if response.reset is not None else "cut" if response.is_cut else "no status"


INVALID, TOO_LARGE, UNKNOWN_METHOD = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"
NO_GRPC = {"HTTP 415"}
BROKEN = {"cut", "reset", "HTTP 400"}
"""Of what is no HTTP/2."""

FRAMING = {
    "no message": ({"body": b""}, INVALID),
    "a piece of a prefix": ({"body": b"\0\0"}, INVALID),
    "a length beyond the body": ({"body": framed(GOOD, 0, len(GOOD) + 10)}, INVALID),
    "a length of 4 GiB": ({"body": framed(GOOD, 0, 0xFFFF_FFFF)}, TOO_LARGE),
    "a length below the body": ({"body": framed(GOOD, 0, len(GOOD) - 3)}, INVALID),
    "bytes after the message": ({"body": framed(GOOD) + b"xyz"}, INVALID),
    "two messages": ({"body": framed(GOOD) * 2}, INVALID),
    "a thousand messages": ({"body": framed(GOOD) * 1000}, INVALID),
    "compressed, with no encoding": ({"body": framed(GOOD, 1)}, INVALID),
    "compressed, with identity": ({"body": framed(GOOD, 1), "change": {"grpc-encoding": "identity"}}, INVALID),
    "flags 2": ({"body": framed(GOOD, 2)}, INVALID),
    "flags 128": ({"body": framed(GOOD, 128)}, INVALID),
    "flags 3, gzip": ({"body": framed(ZIPPED, 3), "change": GZIP}, INVALID),
    "said to be gzip": ({"body": framed(GOOD, 1), "change": GZIP}, INVALID),
    "gzip that ends early": ({"body": framed(ZIPPED[:-9], 1), "change": GZIP}, INVALID),
    "bytes after gzip": ({"body": framed(ZIPPED + b"abc", 1), "change": GZIP}, INVALID),
    "gzip twice": ({"body": framed(ZIPPED * 2, 1), "change": GZIP}, INVALID),
    "gzip of nothing at all": ({"body": framed(b"", 1), "change": GZIP}, INVALID),
    "gzip with a wrong sum": ({"body": framed(ZIPPED[:-8] + bytes(8), 1), "change": GZIP}, INVALID),
    "gzip of far more": ({"body": framed(BOMB, 1), "change": GZIP}, TOO_LARGE),
    "an encoding that nobody knows": ({"body": framed(GOOD, 1), "change": {"grpc-encoding": "snappy"}}, UNKNOWN_METHOD),
    "no protobuf": ({"body": framed(b"\xff" * 50)}, INVALID),
    "text that is no text": ({"body": framed(b"\x0a\x04\xff\xfe\xfd\xfc")}, INVALID),
    "groups in groups": ({"body": framed(b"\x2b" * 5000 + b"\x2c" * 5000)}, INVALID),
    "a stream that ends in a message": ({"body": framed(GOOD) + framed(GOOD, 0, 1000), "path": STREAM}, INVALID),
    "a stream with bytes after": ({"body": framed(GOOD) + b"abc", "path": STREAM}, INVALID),
    "a stream with no protobuf in it": ({"body": framed(GOOD) + framed(b"\xff" * 9), "path": STREAM}, INVALID),
    "a stream with flags 9": ({"body": framed(GOOD) + framed(GOOD, 9), "path": STREAM}, INVALID),
    "a stream with 4 GiB": ({"body": framed(GOOD) + framed(GOOD, 0, 0xFFFF_FFFF), "path": STREAM}, TOO_LARGE),
    "a stream with far more": ({"body": framed(BOMB, 1), "path": STREAM, "change": GZIP}, TOO_LARGE),
}


@pytest.mark.parametrize("case", FRAMING)
def test_framing(target: Target, case: str) -> None:
    sent, expected = FRAMING[case]
    got = end_of_call(target, **sent)
    assert got == expected, got


GOOD_FORMS = {
    "in single bytes": {"body": [framed(GOOD)[n : n + 1] for n in range(len(framed(GOOD)))]},
    "gzip": {"body": framed(ZIPPED, 1), "change": GZIP},
    "deflate": {"body": framed(zlib.compress(GOOD), 1), "change": {"grpc-encoding": "deflate"}},
    "gzip allowed, and not used": {"body": framed(GOOD), "change": GZIP},
    "application/grpc+proto": {"body": framed(GOOD), "change": {"content-type": "application/grpc+proto"}},
    "bytes that are no text in metadata": {"body": framed(GOOD), "change": {"x-mine": b"\xff\xfe"}},
    "a large header": {"body": framed(GOOD), "change": {"x-mine": b"a" * 6000}},
    "a tenant that is no text": {"body": framed(GOOD), "change": {"x-shoal-tenant": b"\xff\xfe"}},
    "a long tenant": {"body": framed(GOOD), "change": {"x-shoal-tenant": b"t" * 5000}},
    "two tenants": {"body": framed(GOOD), "more": [(b"x-shoal-tenant", b"a"), (b"x-shoal-tenant", b"b")]},
    "the longest deadline": {"body": framed(GOOD), "change": {"grpc-timeout": "99999999H"}},
    "an empty stream": {"body": b"", "path": STREAM},
}


@pytest.mark.parametrize("case", GOOD_FORMS)
def test_what_is_odd_and_right(target: Target, case: str) -> None:
    with Connection(target.address) as connection:
        response = connection.call(**GOOD_FORMS[case])
    assert end_of(response, target) == "OK", response
    for message in response.messages:
        np.testing.assert_array_equal(output(pb.ModelInferResponse.FromString(message), "y"), 2 * X)


SERVICE = "/inference.GRPCInferenceService"
BODY = {"body": framed(GOOD)}
HEADERS = {
    "a timeout of letters": (dict(**BODY, change={"grpc-timeout": "abc"}), {INVALID}),
    "a timeout of no unit": (dict(**BODY, change={"grpc-timeout": "5"}), {INVALID}),
    "a timeout below nothing": (dict(**BODY, change={"grpc-timeout": "-1S"}), {INVALID}),
    "a timeout of nothing": (dict(**BODY, change={"grpc-timeout": "0n"}), {"DEADLINE_EXCEEDED"}),
    "an empty timeout": (dict(**BODY, change={"grpc-timeout": ""}), {INVALID}),
    "metadata that is no base64": (dict(**BODY, change={"x-mine-bin": "!!!!"}), {INVALID, "OK"}),
    "a line break in metadata": (dict(**BODY, change={"x-mine": b"a\r\nb: c"}), {"OK", *BROKEN}),
    "a zero in metadata": (dict(**BODY, change={"x-mine": b"a\0b"}), {"OK", *BROKEN}),
    "a name in capitals": (dict(**BODY, more=[(b"X-Mine", b"a")]), {"OK", *BROKEN}),
    "an empty name": (dict(**BODY, more=[(b"", b"a")]), {"OK", *BROKEN}),
    "headers of 100 kB": (dict(**BODY, change={"x-mine": b"a" * 100_000}), {"OK", TOO_LARGE, "HTTP 431", *BROKEN}),
    "2,000 headers": (
        dict(**BODY, more=[(b"x-%d" % n, b"v") for n in range(2000)]),
        {"OK", TOO_LARGE, "HTTP 431", *BROKEN},
    ),
    "no te": (dict(**BODY, change={"te": None}), {"OK", "no status", *BROKEN}),
    "another content type": ({"body": b"{}", "change": {"content-type": "application/json"}}, NO_GRPC),
    "no content type": (dict(**BODY, change={"content-type": None}), NO_GRPC),
    "a content type that begins alike": (dict(**BODY, change={"content-type": "application/grpcfoo"}), NO_GRPC),
    # Envoy translates it, and the status is in the body.
    "grpc-web": (dict(**BODY, change={"content-type": "application/grpc-web"}), {*NO_GRPC, "no status"}),
    "GET": ({"body": b"", "change": {":method": "GET"}}, {*NO_GRPC, "HTTP 405", *BROKEN}),
    "PUT": (dict(**BODY, change={":method": "PUT"}), {*NO_GRPC, "HTTP 405", *BROKEN}),
    "an unknown method": (dict(**BODY, path=f"{SERVICE}/Nope"), {UNKNOWN_METHOD}),
    "an unknown service": (dict(**BODY, path="/no.Such/ModelInfer"), {UNKNOWN_METHOD}),
    "an empty path": (dict(**BODY, path=""), {UNKNOWN_METHOD, *BROKEN}),
    "the root": (dict(**BODY, path="/"), {UNKNOWN_METHOD}),
    "a path of no slash": (dict(**BODY, path=INFER[1:]), {UNKNOWN_METHOD, *BROKEN}),
    "a path of two slashes": (dict(**BODY, path=f"/{INFER}"), {UNKNOWN_METHOD}),
    "a path upwards": (dict(**BODY, path=f"{SERVICE}/../x/ModelInfer"), {UNKNOWN_METHOD}),
    "a path with a query": (dict(**BODY, path=f"{INFER}?x=1"), {UNKNOWN_METHOD, "OK"}),
    "a path of 20 kB": (dict(**BODY, path="/" + "a" * 20_000), {UNKNOWN_METHOD, *BROKEN}),
    "no path": (dict(**BODY, change={":path": None}), {UNKNOWN_METHOD, *BROKEN}),
    "no authority": (dict(**BODY, change={":authority": None}), {"OK", *BROKEN}),
    "a content length that lies": (dict(**BODY, change={"content-length": "3"}), {"OK", INVALID, *BROKEN}),
    "a header of HTTP/1": (dict(**BODY, change={"connection": "close"}), {"OK", *BROKEN}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(target: Target, case: str) -> None:
    sent, expected = HEADERS[case]
    got = end_of_call(target, **sent)
    assert got in expected, got


def test_a_path_that_is_no_text(target: Target) -> None:
    for path in (f"{INFER[:-1]}\xe9", "/\xff"):
        assert end_of_call(target, body=framed(GOOD), path=path) in {UNKNOWN_METHOD, *BROKEN}


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", size: int | None = None) -> bytes:
    length = (len(payload) if size is None else size).to_bytes(3, "big")
    return length + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


SETTINGS = frame(4, 0, 0)
NO_HTTP2 = {
    "nothing": b"",
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + b"\1" * 300,
    "noise": random.Random(1).randbytes(5000),
    "half a preface": PREFACE[:10],
    "a preface and noise": PREFACE + random.Random(2).randbytes(5000),
    "data on a stream that is none": PREFACE + SETTINGS + frame(0, 1, 1, b"abc"),
    "headers that are no HPACK": PREFACE + SETTINGS + frame(1, 5, 1, b"\xff" * 50),
    "an index of HPACK that is none": PREFACE + SETTINGS + frame(1, 5, 1, b"\xff\xff\xff\xff\x0f"),
    "headers on an even stream": PREFACE + SETTINGS + frame(1, 5, 2, b"\x82"),
    "a frame of 16 MB": PREFACE + SETTINGS + frame(0, 0, 1, b"a" * 100, (1 << 24) - 1),
    "padding beyond the frame": PREFACE + SETTINGS + frame(1, 0x0D, 1, b"\xff\x82"),
    "continuation of nothing": PREFACE + SETTINGS + frame(9, 4, 1, b"\x82"),
    "continuations without end": PREFACE
    + SETTINGS
    + frame(1, 1, 1, b"\x82")
    + frame(9, 0, 1, b"\x00\x01a\x01b" * 200) * 300,
    "a window of nothing": PREFACE + SETTINGS + frame(8, 0, 0, bytes(4)),
    "a window beyond all": PREFACE + SETTINGS + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "settings of no length": PREFACE + frame(4, 0, 0, b"abc"),
    "settings that are wrong": PREFACE + frame(4, 0, 0, b"\0\4\xff\xff\xff\xff"),
    "a thousand settings": PREFACE + SETTINGS * 1000,
    "a thousand pings": PREFACE + SETTINGS + frame(6, 0, 0, b"12345678") * 1000,
    "a ping of no length": PREFACE + SETTINGS + frame(6, 0, 0, b"1"),
    "goodbye": PREFACE + SETTINGS + frame(7, 0, 0, bytes(8)),
    "a promise": PREFACE + SETTINGS + frame(5, 4, 1, bytes(4) + b"\x82"),
    "frames of unknown kinds": PREFACE + SETTINGS + b"".join(frame(kind, 0xFF, 1, b"abc") for kind in range(10, 256)),
    "resets of what never was": PREFACE + SETTINGS + b"".join(frame(3, 0, 2 * n + 1, bytes(4)) for n in range(500)),
}


@pytest.mark.parametrize("case", NO_HTTP2)
def test_what_is_no_http2_ends_its_connection_and_no_other(target: Target, case: str) -> None:
    with Connection(target.address) as bystander:
        raw(target.address, NO_HTTP2[case])
        assert bystander.call(framed(GOOD)).status == 0


def test_calls_that_are_reset_as_soon_as_they_are_made(target: Target) -> None:
    with Connection(target.address) as connection, contextlib.suppress(OSError):  # Enough of it, it may say.
        for n in range(300):
            stream = connection.open()
            if n % 3:
                connection.send(stream, framed(GOOD), end=n % 3 == 2)
            connection.reset(stream)


def test_connections_that_are_left_half_way(target: Target) -> None:
    target.check()
    before = target.descriptors()
    for n in range(60):
        connection = Connection(target.address)
        stream = connection.open(STREAM if n % 2 else INFER)
        connection.send(stream, framed(GOOD)[: n % 30])
        connection.socket.close()
    asyncio.run(until(lambda: target.descriptors() <= before + 5, "the descriptors given back"))


CORPUS = [
    GOOD,
    request("any", x=floats([1, 2], [3, 4])).SerializeToString(),
    request("double", version="1", id="i", x=X).SerializeToString(),
    request("nope", x=X).SerializeToString(),
]
OF_BAD_INPUT = {"OK", INVALID, "NOT_FOUND", UNKNOWN_METHOD, TOO_LARGE, "DEADLINE_EXCEEDED"}


@pytest.mark.parametrize("seed", range(3))
def test_spoiled_messages(target: Target, seed: int) -> None:
    rng = random.Random(seed)
    with Connection(target.address) as connection:
        for _ in range(250):
            data = rng.choice(CORPUS) if rng.random() < 0.2 else mutated(rng, CORPUS)
            response = connection.call(framed(data))
            assert end_of(response, target) in OF_BAD_INPUT, response
            if response.status == 0:
                check_values(data, response.messages[0])


def check_values(sent: bytes, got: bytes) -> None:
    """The response fits the request as any protobuf library reads it: shortcuts must not read it otherwise."""
    asked, response = pb.ModelInferRequest.FromString(sent), pb.ModelInferResponse.FromString(got)
    assert (response.model_name, response.id) == (asked.model_name, asked.id)
    [tensor] = asked.inputs
    raw = asked.raw_input_contents[0] if asked.raw_input_contents else None
    x = np.array(tensor.contents.fp32_contents, "f4") if raw is None else np.frombuffer(raw, "f4")
    if any("classification" in each.parameters for each in asked.outputs):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = 2 * x if asked.model_name == "double" else x
    np.testing.assert_array_equal(output(response, "y"), wanted.reshape(tuple(tensor.shape)))


@pytest.mark.parametrize("method", ["ModelConfig", "ModelMetadata", "ModelStatistics", "RepositoryIndex", "ModelReady"])
def test_spoiled_messages_of_other_methods(target: Target, method: str) -> None:
    rng = random.Random(method)
    asked = [pb.ModelMetadataRequest(name="double", version="1").SerializeToString(), b""]
    with Connection(target.address) as connection:
        for _ in range(40):
            response = connection.call(framed(mutated(rng, asked)), path=f"{SERVICE}/{method}")
            assert end_of(response, target) in OF_BAD_INPUT, response


def test_a_stream_survives_what_is_wrong_with_its_requests(target: Target) -> None:
    rng = random.Random(7)
    sent = []
    while len(sent) < 200:
        data = mutated(rng, CORPUS)
        try:
            pb.ModelInferRequest.FromString(data)
        except Exception:  # That would end the stream, as it should.
            continue
        sent.append(data)
    with Connection(target.address) as connection:
        response = connection.call(b"".join(framed(data) for data in [*sent, GOOD]), path=STREAM)
    assert end_of(response, target) == "OK", response
    responses = [pb.ModelStreamInferResponse.FromString(message) for message in response.messages]
    assert len(responses) == len(sent) + 1
    np.testing.assert_array_equal(output(responses[-1].infer_response, "y"), 2 * X)
    assert all("internal error" not in each.error_message for each in responses)


def test_memory_stays_what_it_was(target: Target) -> None:
    huge = request("double", x=X)
    huge.raw_input_contents[0] = bytes(6 << 20)
    wasteful = [
        {"body": framed(BOMB, 1), "change": GZIP},
        {"body": framed(BOMB, 1), "path": STREAM, "change": GZIP},
        {"body": framed(huge.SerializeToString())},
        {"body": framed(huge.SerializeToString()), "path": STREAM},
        {"body": framed(gzip.compress(huge.SerializeToString(), 1), 1), "change": GZIP},
        {"body": framed(request("any", x=np.zeros((1, 1 << 20), np.float32)).SerializeToString())},
    ]
    for sent in wasteful * by_form(1, 2):
        end_of_call(target, **sent)
    before = target.rss()
    for sent in wasteful * by_form(2, 4):
        end_of_call(target, **sent)
    target.check()
    assert target.rss() - before < ROOM_BYTES
