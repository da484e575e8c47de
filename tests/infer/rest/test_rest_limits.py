"""REST in infer: bounds of JSON and bodies, memory, deadlines, cancelled calls, and bystanders meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from mesh.h2.headers import Block
from mesh.h2.memory_account import MemoryAccount
from mesh.rest import json_text, tensor_json, web_pages
from mesh.rest.json_text import JSON_BYTES, MAX_CONTAINERS, MAX_VALUES, JsonParser
from shoal.errors import InvalidArgument, Unavailable
from shoal.oip.datatypes import BY_NAME
from tests.breakable import until
from tests.http2 import INFER, Connection
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving
from tests.mesh.http1.raw import RawClient, Response

PATH = "/v2/models/double/infer"


@pytest_asyncio.fixture
async def served(serve: Any, models_folder: Repository) -> Serving:
    models_folder.bare("double", onnx_files.scale(2))
    models_folder.put("wide", onnx_files.scale(2), config="max_batch_size: 0")
    serving: Serving = await serve(models_folder.root)
    return serving


@pytest_asyncio.fixture
async def client(served: Serving) -> AsyncIterator[RawClient]:
    async with await RawClient.connect(served.server.address) as client:
        yield client


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


def body(**changes: Any) -> bytes:
    return json.dumps({"inputs": [tensor(**changes)]}).encode()


async def infer(client: RawClient, data: bytes, *headers: str, model: str = "double") -> Response:
    return await client.request("POST", f"/v2/models/{model}/infer", data, *headers)


def error(response: Response) -> tuple[int, str]:
    return response.status, json.loads(response.body)["error"]


HOSTILE = {
    "deep": b'{"inputs":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "lists": b'{"inputs":[' + b"[]," * MAX_CONTAINERS + b"1]}",
    "objects": b'{"inputs":[' + b"{}," * MAX_CONTAINERS + b"1]}",
    "names": b"{" + b",".join(b'"%06d":1' % n for n in range(MAX_CONTAINERS + 1)) + b"}",
    "values": b'{"inputs":[' + b"1," * MAX_VALUES + b"1,1]}",
    "text": b'{"id":"' + b"a" * JSON_BYTES + b'"}',
    "inputs": b'{"inputs":[' + b"{}," * 5_000 + b"{}]}",
    "parameters": b'{"parameters":{' + b",".join(b'"%d":1' % n for n in range(2_000)) + b'},"inputs":[]}',
    "dimensions": body(shape=[1] * 100),
    "huge shape": body(shape=[2**40, 2**40]),
    "nested": b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":' + b"[" * 900 + b"]" * 900 + b"}]}",
    "names of errors": body(name="n" * 100_000),
    "surrogates": b'{"inputs":[{"name":"\\ud800","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}',
    "endless integer": b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1' + b"0" * 100_000 + b"]}]}",
    "NaN, endless integer": b'{"a":NaN,"inputs":[{"name":"x","shape":[1],"datatype":"INT64","data":[1'
    + b"0" * 100_000
    + b"]}]}",
    "NaN, deep": b'{"a":NaN,"inputs":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "no text": b"\xff\xfe" * 100,
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_json_that_costs_too_much_or_is_none_is_refused_and_named(client: RawClient, case: str) -> None:
    status, message = error(await infer(client, HOSTILE[case]))
    assert status == 400
    assert len(message) < 1_000
    assert json.loads((await infer(client, body())).body)["outputs"][0]["data"] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "data",
    [
        b'{"inputs":[' + b"[]," * (MAX_CONTAINERS - 3) + b"1]}",
        b'{"inputs":[' + b"0.12345678," * (MAX_VALUES - 1) + b"1]}",
        body(shape=[MAX_VALUES // 4 - 2, 4], data=[1] * (MAX_VALUES - 8)),
    ],
    ids=["containers", "numbers", "a tensor"],
)
async def test_the_costliest_json_that_is_accepted_leaves_iterations_to_others(
    served: Serving, client: RawClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is one of work: the bytes that are parsed at once are asserted, and no time."""
    iterations = largest = 0
    parse = JsonParser.__call__

    def observed(self: JsonParser, text: bytes, start: int = 0) -> Any:
        nonlocal largest
        largest = max(largest, len(text))
        return parse(self, text, start)

    monkeypatch.setattr(JsonParser, "__call__", observed)

    async def others() -> None:
        nonlocal iterations
        while True:
            await asyncio.sleep(0)
            iterations += 1

    async with await RawClient.connect(served.server.address) as bystander:
        beside = asyncio.create_task(others())
        answering = asyncio.create_task(infer(client, data, model="wide"))
        served_meanwhile = 0
        while not answering.done():
            assert (await infer(bystander, body())).status == 200
            served_meanwhile += 1
        beside.cancel()
    assert served_meanwhile >= 1
    assert (await answering).status in (200, 400)
    assert 60_000 < largest < 70_000
    await until(lambda: served.server.memory.bodies.held == 0)


def test_a_parse_within_its_bounds_is_short() -> None:
    """The bounds are counts; this states what they mean, with a limit for a slow machine."""
    for data in (b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"1]", b"[" + b"1.5," * (MAX_VALUES - 1) + b"1]"):
        assert json_text.parsed_bytes(data) > len(data)
        began = time.process_time()
        json_text.PARSER(data)
        assert time.process_time() - began < 2.0


async def test_a_body_that_is_too_large_is_refused_before_it_arrives(client: RawClient) -> None:
    client.send(
        b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\nExpect: 100-continue\r\n\r\n" % PATH.encode()
    )
    assert (await client.response()).status == 413
    assert await client.until_closed() == b""


async def test_a_chunked_body_that_is_too_large_is_refused_while_it_arrives(
    served: Serving, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = served.server._app.http
    monkeypatch.setattr(app, "message_bytes", 1 << 20)
    client.send(b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % PATH.encode())
    client.send((b"10000\r\n" + bytes(65_536) + b"\r\n") * 20)
    assert error(await client.response())[0] == 429
    assert await client.until_closed() == b""
    await until(lambda: served.server.memory.bodies.held == 0)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_bomb_is_refused_and_a_compressed_tensor_is_not(
    served: Serving, client: RawClient, encoding: str
) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    status, message = error(await infer(client, pack(bytes(200 << 20)), f"Content-Encoding: {encoding}"))
    assert status in (400, 429)
    assert "at most" in message or "larger" in message
    array = np.random.default_rng(1).integers(0, 3, (200_000, 4)).astype("<f4")
    described = {
        "name": "x",
        "shape": [200_000, 4],
        "datatype": "FP32",
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    sent = pack(head + array.tobytes())
    more = (f"Content-Encoding: {encoding}", f"Inference-Header-Content-Length: {len(head)}", "Accept-Encoding: gzip")
    answer = await infer(client, sent, *more, model="wide")
    assert (answer.status, answer.headers["content-encoding"]) == (200, "gzip")
    plain = gzip.decompress(answer.body)
    raw = plain[int(answer.headers["inference-header-content-length"]) :]
    assert (np.frombuffer(raw, "<f4").reshape(-1, 4) == 2 * array).all()
    await until(lambda: served.server.memory.bodies.held == 0)


async def test_a_large_binary_tensor_is_counted_until_its_response_and_then_no_more(
    served: Serving, client: RawClient
) -> None:
    array = np.ones((4_000_000, 4), "<f4")
    described = {
        "name": "x",
        "shape": list(array.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    answer = await infer(client, head + array.tobytes(), f"Inference-Header-Content-Length: {len(head)}", model="wide")
    raw = answer.body[int(answer.headers["inference-header-content-length"]) :]
    assert (np.frombuffer(raw, "<f4") == 2).all()
    await until(lambda: served.server.memory.bodies.held == 0)


async def test_without_memory_calls_are_refused_with_a_time_to_retry(
    served: Serving, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = served.server.memory
    monkeypatch.setattr(memory, "bodies", MemoryAccount(1 << 20))
    answer = await infer(client, body(shape=[60_000, 4], data=[1] * 240_000), model="wide")
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["retry-after-ms"] == "1000"


@pytest.mark.parametrize("timeout", ["1n", "20m"])
async def test_a_deadline_ends_a_call(serve: Any, models_folder: Repository, timeout: str) -> None:
    config = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 60000000 }"
    models_folder.put("double", onnx_files.scale(2), config=config)
    served: Serving = await serve(models_folder.root)
    async with await RawClient.connect(served.server.address) as client:
        assert error(await infer(client, body(), f"grpc-timeout: {timeout}"))[0] == 504
        assert error(await infer(client, body(), "grpc-timeout: soon"))[0] == 400
        assert (await client.request("GET", "/v2/health/live")).status == 200


async def test_a_client_that_leaves_cancels_its_call(serve: Any, models_folder: Repository) -> None:
    config = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 60000000 }"
    models_folder.put("double", onnx_files.scale(2), config=config)
    served: Serving = await serve(models_folder.root)
    tasks = served.server._app.tasks
    async with await RawClient.connect(served.server.address) as client:
        client.send(
            b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (PATH.encode(), len(body()), body())
        )
        await until(lambda: bool(tasks))
    await until(lambda: not tasks)
    await until(lambda: served.server.memory.bodies.held == 0)


PATHS = {
    "/v2/models/dou%62le/ready": 200,
    "/v2/models/double/ready?x=y": 200,
    "/v2/models/dou%2562le/ready": 400,
    "/v2/models/double%2Fready": 404,
    "/v2/models/..%2f..%2fetc/ready": 404,
    "/v2/models/%2e%2e/ready": 404,
    "/v2/models/./double": 404,
    "/v2/models//double": 404,
    "/v2/models/double/": 404,
    "/v2/models/a%5c..%5cb/ready": 400,
    "/v2/models/a%00b/ready": 400,
    "/v2/models/a%0d%0ab/ready": 400,
    "/v2/models/%zz/ready": 400,
    "/v2/models/%f/ready": 400,
    "/v2/models/%ff/ready": 400,
    "/v2/models/double/versions/+1/ready": 404,
    "/v2/models/double/versions/99999999999999999999/ready": 400,
    "/V2/models/double/ready": 404,
    "*": 404,
}


@pytest.mark.parametrize("path", PATHS)
async def test_names_are_decoded_once_and_traversal_is_no_name(client: RawClient, path: str) -> None:
    answer = await client.request("GET", path)
    assert answer.status == PATHS[path]


async def test_head_is_get_without_the_body(client: RawClient) -> None:
    for path, status in (("/v2", 200), ("/v2/health/ready", 200), ("/v2/models/none/config", 404)):
        got, headed = await client.request("GET", path), await client.request("HEAD", path)
        assert (headed.status, headed.headers, headed.body) == (got.status, got.headers, b"")
        assert status == got.status


async def test_a_response_to_head_has_no_body_over_http_2(served: Serving) -> None:
    def call() -> None:
        with Connection(served.server.address) as one:
            for path, status in (
                ("/v2", 200),
                ("/v2/health/ready", 200),
                ("/v2/models/double/ready", 200),
                ("/v2/models/none/ready", 400),
                ("/v2/models/double/infer", 405),
                ("/v2/none", 404),
                (INFER, 415),
            ):
                answer = one.call(path=path, change={":method": "HEAD", "content-type": None})
                assert (answer.http_status, answer.data, answer.reset, answer.is_cut) == (status, b"", None, False)

    await asyncio.to_thread(call)


@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
def test_a_web_page_reaches_nothing(method: str) -> None:
    for origin in (b"http://evil.example", b"null", b"http://localhost:3000"):
        head = Block([(b":method", method.encode()), (b"host", b"127.0.0.1"), (b"origin", origin)])
        refused = web_pages.refusal(head, "127.0.0.1")
        assert refused is not None
        assert refused[0] == 403
        # The Envoy in front decides about origins.
        assert web_pages.refusal(head, "unix") is None


@pytest.mark.parametrize(
    ("host", "peer", "status"),
    [
        ("evil.example:8001", "127.0.0.1", 421),
        ("127.0.0.1.nip.io", "127.0.0.1", 421),
        ("evil.example", "::1", 421),
        ("127.0.0.1:8001", "127.0.0.1", None),
        ("[::1]:8001", "::1", None),
        ("LocalHost:8001", "127.0.0.1", None),
        ("a.localhost", "127.0.0.1", None),
        ("workstation:8001", "127.0.0.1", None),
        ("models.example", "10.0.0.7", None),
        ("models.example", "unix", None),
    ],
)
def test_a_foreign_name_for_loopback_is_refused(host: str, peer: str, status: int | None) -> None:
    for name in (b"host", b":authority"):
        refused = web_pages.refusal(Block([(name, host.encode())]), peer)
        assert (refused and refused[0]) == status


async def test_a_load_over_rest_is_audited_before_it_is_done(served: Serving, client: RawClient) -> None:
    acts: list[tuple[object, ...]] = []

    class Acts:
        @contextlib.asynccontextmanager
        async def act(self, *about: object) -> AsyncIterator[None]:
            acts.append(about)
            if len(acts) > 1:
                raise Unavailable("the audit log cannot be written, so nothing was done")
            yield

    assert served.server is not None
    served.server._app.http.auditing = Acts()  # type: ignore[union-attr]
    load = "/v2/repository/models/double/load"
    assert (await client.request("POST", load, b"", "x-envoy-external-address: 10.0.0.7")).status == 200
    assert (await client.request("POST", load.replace("load", "unload"), b"")).status == 503
    assert (await infer(client, body())).status == 200
    rpc = "/inference.GRPCInferenceService/RepositoryModel"
    assert acts == [(f"{rpc}Load", None, "10.0.0.7", "double"), (f"{rpc}Unload", None, "", "double")]


async def test_rest_and_grpc_share_one_address_and_one_account(served: Serving, client: RawClient) -> None:
    assert (await infer(client, body())).status == 200
    statistics = json.loads((await client.request("GET", "/v2/models/double/stats")).body)
    assert statistics["model_stats"][0]["inference_count"] == 1


VALUES = [
    ("BOOL", [True, False]),
    ("INT8", [-128, 127]),
    ("UINT64", [0, 2**64 - 1]),
    ("INT64", [-(2**63), 2**63 - 1]),
    ("FP32", [0.5, -1e30]),
    ("FP64", [0.1, 1e300]),
    ("BYTES", ["", 'é\n"中']),
]


@pytest.mark.parametrize(("name", "values"), VALUES)
@pytest.mark.parametrize("count", [2, 200_000])
async def test_values_come_back_as_they_were_sent(name: str, values: list[Any], count: int) -> None:
    datatype, sent = BY_NAME[name], (values * count)[:count]
    raw = await tensor_json.to_raw([sent], datatype, count, 2, "input 'x'")
    assert json.loads(b"[%b]" % b"".join(await tensor_json.to_json(raw, name, count, "y"))) == sent


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("INT8", [128]),
        ("UINT8", [-1]),
        ("INT32", [1.5]),
        ("INT32", [True]),
        ("FP32", ["1"]),
        ("FP32", [None]),
        ("BOOL", [1]),
        ("BYTES", [1]),
        ("FP16", [1]),
        ("FP32", [1, 2]),
        ("FP32", [[[1]]]),
    ],
)
async def test_a_value_that_its_datatype_does_not_have_is_refused(name: str, values: list[Any]) -> None:
    with pytest.raises(InvalidArgument):
        await tensor_json.to_raw(values, BY_NAME[name], 1, 2, "input 'x'")
