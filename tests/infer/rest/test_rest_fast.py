"""REST on the fast path: responses are those of the slow path, byte for byte, and other requests take the slow path."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from mesh.process import telemetry
from mesh.process.kept_spans import KeptSpans
from mesh.rest.call import RestCall
from services.infer.rest import fast_infer
from shoal.errors import ResourceExhausted
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving
from tests.mesh.h2.test_plain_http import Client
from tests.mesh.http1.raw import RawClient, Response

ROW = np.arange(4, dtype="<f4").reshape(1, 4)
HELD = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 60000000 }"


class Served:
    """A server, and the number of calls that took its slow path."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.slow = 0
        infer = serving.core.infer

        async def counted(*args: Any, **named: Any) -> Any:
            self.slow += 1
            return await infer(*args, **named)

        serving.core.infer = counted  # type: ignore[method-assign]

    def client(self) -> Any:
        return RawClient.connect(self.serving.server.address)


@pytest_asyncio.fixture
async def start(serve: Any, models_folder: Repository) -> Callable[..., Any]:
    async def started(config: str | None = None) -> Served:
        models_folder.bare("two", onnx_files.add())
        models_folder.put("double", onnx_files.scale(2), config=config)
        return Served(await serve(models_folder.root))

    return started


@pytest_asyncio.fixture
async def served(start: Any) -> Served:
    made: Served = await start()
    return made


@pytest_asyncio.fixture
async def client(served: Served) -> AsyncIterator[RawClient]:
    async with await served.client() as client:
        yield client


def described(name: str, array: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": array.nbytes},
    }


def written(document: dict[str, Any], *arrays: np.ndarray) -> tuple[bytes, str]:
    head = json.dumps(document).encode()
    return head + b"".join(array.tobytes() for array in arrays), f"Inference-Header-Content-Length: {len(head)}"


def doubling(array: np.ndarray = ROW, **more: Any) -> tuple[bytes, str]:
    document = {"inputs": [described("x", array)], "parameters": {"binary_data_output": True}, **more}
    return written(document, array)


async def infer(client: RawClient, data: bytes, *headers: str, model: str = "double", query: str = "infer") -> Response:
    return await client.request("POST", f"/v2/models/{model}/{query}", data, *headers)


def adding(**more: Any) -> tuple[bytes, str]:
    a, b = np.float32([[1, 2]]), np.float32([[3, 5]])
    document = {"inputs": [described("a", a), described("b", b)], "parameters": {"binary_data_output": True}, **more}
    return written(document, a, b)


FAST = {
    "one input": (doubling(), {}),
    "rows": (doubling(np.ones((7, 4), "<f4")), {}),
    "a version": (doubling(), {"query": "versions/1/infer"}),
    "a query": (doubling(), {"query": "infer?a=b"}),
    "two inputs": (adding(), {"model": "two"}),
    "one output of two": (
        adding(parameters={}, outputs=[{"name": "difference", "parameters": {"binary_data": True}}]),
        {"model": "two"},
    ),
}


@pytest.mark.parametrize("case", FAST)
async def test_equal_json_takes_the_fast_path_and_the_response_is_the_same(
    served: Served, client: RawClient, case: str
) -> None:
    (data, header), named = FAST[case]
    first = await infer(client, data, header, **named)
    assert served.slow == 1
    for _ in range(3):
        assert await infer(client, data, header, **named) == first
    assert first.status == 200
    assert served.slow == 1
    assert served.serving.server.memory.bodies.held == 0


@pytest.mark.parametrize(("slow_ns", "count"), [(-1.0, 2), (math.inf, 0)])
async def test_a_call_that_takes_longer_than_its_model_may_leaves_a_span_on_both_paths(
    served: Served, client: RawClient, monkeypatch: pytest.MonkeyPatch, slow_ns: float, count: int
) -> None:
    kept = KeptSpans(lambda: 0.0)
    monkeypatch.setattr(telemetry, "kept_spans", lambda: kept)
    # Without the goal of the model, each call would leave one, and then none.
    monkeypatch.setattr(RestCall, "slow_s", -slow_ns)
    served.serving.models.find("double", "").slow_ns = slow_ns
    for _ in range(2):
        assert (await infer(client, *doubling())).status == 200
    assert served.slow == 1
    await until(lambda: len(kept.tail.all()) >= count, "the spans are kept")
    assert [span["attributes"]["shoal.model"] for span in kept.tail.all()] == ["double"] * count


async def test_both_versions_of_http_take_the_fast_path(served: Served, client: RawClient) -> None:
    first = await infer(client, DATA, LENGTH)
    address = served.serving.server.address
    h2_client = Client(*await asyncio.open_unix_connection(address.removeprefix("unix:")))
    name, value = LENGTH.lower().split(": ")
    for _ in range(2):
        number = await h2_client.request("POST", "/v2/models/double/infer", DATA, (name, value))
        head, body = await h2_client.read_all(number)
        assert head.pop(":status") == "200"
        assert (head, body) == (first.headers, first.body)
    h2_client.writer.close()
    assert served.slow == 1


async def test_the_numbers_of_each_request_count(served: Served, client: RawClient) -> None:
    for number in range(5):
        array = np.full((1, 4), number, "<f4")
        answer = await infer(client, *doubling(array))
        raw = answer.body[int(answer.headers["inference-header-content-length"]) :]
        assert (np.frombuffer(raw, "<f4") == 2 * number).all()
    assert served.slow == 1


async def test_pipelined_requests_are_answered_in_their_order(served: Served, client: RawClient) -> None:
    await infer(client, *doubling())
    for number in range(20):
        data, header = doubling(np.full((1, 4), number, "<f4"))
        head = f"POST /v2/models/double/infer HTTP/1.1\r\nHost: a\r\n{header}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.send(head.encode() + data)
    for number in range(20):
        answer = await client.response()
        assert np.frombuffer(answer.body[-16:], "<f4")[0] == 2 * number
    assert served.slow == 1


def around(data: str, before: str = "", after: str = "", end: str = "") -> bytes:
    """Return a request with the text `data` as the data of its only input."""
    tensor = '"name": "x", "shape": [1, 4], "datatype": "FP32"'
    return f'{{"inputs": [{{{before}{tensor}, "data": {data}{after}}}]{end}}}'.encode()


JSON = {
    "a list": around("[1, 2.5, -3, 4e3]"),
    "an output": around("[1,2,3,4]", end=', "outputs": [{"name": "y"}]'),
    "JSON outputs by name": around("[1,2,3,4]", end=', "parameters": {"binary_data_output": false}'),
    "data first": b'{"inputs":[{"data":[1,2,3,4],"name":"x","shape":[1,4],"datatype":"FP32"}]}',
}


@pytest.mark.parametrize("limit", [fast_infer._MAX_WRITTEN, 0])
@pytest.mark.parametrize("case", JSON)
async def test_small_json_takes_the_fast_path_and_the_response_is_the_same(
    served: Served, client: RawClient, monkeypatch: pytest.MonkeyPatch, case: str, limit: int
) -> None:
    monkeypatch.setattr(fast_infer, "_MAX_WRITTEN", limit)
    first = await infer(client, JSON[case])
    assert first.status == 200
    for _ in range(3):
        assert await infer(client, JSON[case]) == first
    assert served.slow == 1
    assert served.serving.server.memory.bodies.held == 0


async def test_the_numbers_of_each_json_count(served: Served, client: RawClient) -> None:
    for number in range(5):
        answer = json.loads((await infer(client, around(str([number, number + 0.5, 7, 8])))).body)
        assert answer["outputs"][0]["data"] == [2 * number, 2 * number + 1, 14, 16]
    assert served.slow == 1


LISTS = {
    "other spaces": " [ 1 ,\n2,3, 4 ] ",
    "extremes": "[1e38, -0.0, 1e-45, 16777217]",
    "huge": "[1e39, 1, 1, 1]",
    "endless": "[1" + "0" * 400 + ", 1, 1, 1]",
    "nested": "[[1, 2, 3, 4]]",
    "nested too deeply": "[[[1, 2, 3, 4]]]",
    "too few": "[1, 2, 3]",
    "too many": "[1, 2, 3, 4, 5]",
    "none": "[]",
    "texts": '["1", "2", "3", "4"]',
    "a bracket in a text": '["]", 2, 3, 4]',
    "true": "[true, 2, 3, 4]",
    "null": "[null, 2, 3, 4]",
    "objects": '[{"a": 1}, 2, 3, 4]',
    "not finite": "[NaN, Infinity, -Infinity, 4]",
    "no JSON": "[1, 2, 3, 4,]",
    "no list": "1",
    "an object": '{"a": [1, 2, 3, 4]}',
    "another member": '[1, 2, 3, 4], "name": "z"',
    "another list": '[1, 2, 3, 4], "data": [5, 6, 7, 8]',
    "another input": '[1, 2, 3, 4]}, {"name": "z", "data": [1]',
}


@pytest.mark.parametrize("case", LISTS)
async def test_both_paths_give_the_same_response_to_any_data(served: Served, client: RawClient, case: str) -> None:
    # Without its data, the request is known after the second call.
    first = await infer(client, around(LISTS[case]))
    assert (await infer(client, around("[1, 2, 3, 4]"))).status == 200
    slow = served.slow
    assert (await infer(client, around("[1, 2, 3, 4]"))).status == 200
    assert served.slow == slow
    for _ in range(2):
        assert await infer(client, around(LISTS[case])) == first


async def test_json_with_two_lists_or_of_two_inputs_takes_the_slow_path(served: Served, client: RawClient) -> None:
    twice = around("[1, 2, 3, 4]", before='"data": [9, 9, 9, 9], ')
    for number in range(3):
        answer = json.loads((await infer(client, twice)).body)
        assert answer["outputs"][0]["data"] == [2, 4, 6, 8]
        assert served.slow == number + 1
    tensors = [{"name": name, "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} for name in ("a", "b")]
    for number in range(3):
        answer = await infer(client, json.dumps({"inputs": tensors}).encode(), model="two")
        assert answer.status == 200
        assert served.slow == number + 4


def mutated(random: Random) -> tuple[bytes, str]:
    """Return a request that is nearly a good one."""
    a = np.float32([[1, 2]])
    document = {"inputs": [described("a", a), described("b", a)], "parameters": {"binary_data_output": True}}
    for each in random.choices([document, *document["inputs"]], k=random.randrange(3)):
        change = random.randrange(3)
        name = random.choice([*each])
        if change == 0:
            del each[name]
        elif change == 1:
            each[name] = random.choice([0, "x", [], [2, 1], {}, {"binary_data_size": 4}, {"binary_data_output": False}])
        else:
            each[random.choice(["data", "id", "outputs", "more"])] = random.choice([[1, 2], "7", [{"name": "sum"}]])
    head = json.dumps(document).encode()
    raw = random.randbytes(random.choice([16, 16, 16, 16, 15, 17, 0]))
    length = len(head) + random.choice([0, 0, 0, 0, 1, -1, len(raw)])
    return head + raw, f"Inference-Header-Content-Length: {length}"


async def test_both_paths_give_the_same_responses_to_requests_that_are_nearly_good(
    served: Served, client: RawClient
) -> None:
    random = Random(14)
    known = served.serving.server._app.http._fast_infer._known
    statuses, fast = [], 0
    for _ in range(150):
        data, header = mutated(random)
        known.clear()
        slow = await infer(client, data, header, model="two")
        await infer(client, *adding(), model="two")
        for _ in range(2):
            before = served.slow
            assert await infer(client, data, header, model="two") == slow
            fast += slow.status == 200 and served.slow == before
        statuses.append(slow.status)
    assert min(statuses.count(200), statuses.count(400), fast) > 10


SLOW = {
    "an id": (*doubling(id="7"), 200),
    "a parameter": (*doubling(parameters={"binary_data_output": True, "priority": 1}), 200),
    "JSON outputs": (*doubling(parameters={}), 200),
    "JSON inputs": (*written({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1] * 4}]}), 200),
    "no input": (*written({"inputs": []}), 400),
}


@pytest.mark.parametrize("case", SLOW)
async def test_other_requests_take_the_slow_path_each_time(served: Served, client: RawClient, case: str) -> None:
    data, header, status = SLOW[case]
    for number in range(3):
        assert (await infer(client, data, header)).status == status
        assert served.slow == number + 1


DATA, LENGTH = doubling()


async def test_a_length_that_is_there_twice_with_one_value_counts_once(served: Served, client: RawClient) -> None:
    first = await infer(client, DATA, LENGTH)
    assert (await infer(client, DATA, LENGTH, LENGTH)) == first
    assert served.slow == 1


UNUSUAL = {
    "a retry": (DATA, [LENGTH, "x-envoy-attempt-count: 2"], 200),
    "a deadline": (DATA, [LENGTH, "grpc-timeout: 1M"], 200),
    "a passed deadline": (DATA, [LENGTH, "grpc-timeout: 0n"], 504),
    "compressed": (gzip.compress(DATA), [LENGTH, "Content-Encoding: gzip"], 200),
    "too short": (DATA[:-1], [LENGTH], 400),
    "too long": (DATA + b"1", [LENGTH], 400),
    "a length beyond the body": (DATA, ["Inference-Header-Content-Length: 9999"], 400),
    "a length that is no number": (DATA, ["Inference-Header-Content-Length: 1_0"], 400),
    "a length inside the JSON": (DATA, ["Inference-Header-Content-Length: 20"], 400),
    "two lengths, the last one right": (DATA, ["Inference-Header-Content-Length: 20", LENGTH], 400),
    "two lengths, the first one right": (DATA, [LENGTH, "Inference-Header-Content-Length: 20"], 400),
    "two encodings, the last one right": (DATA, [LENGTH, "Content-Encoding: gzip", "Content-Encoding: identity"], 501),
    "compressed twice, it says": (gzip.compress(DATA), [LENGTH, *["Content-Encoding: gzip"] * 2], 501),
}


@pytest.mark.parametrize("case", UNUSUAL)
async def test_an_unusual_request_with_known_json_takes_the_slow_path(
    served: Served, client: RawClient, case: str
) -> None:
    first = await infer(client, DATA, LENGTH)
    data, headers, status = UNUSUAL[case]
    answer = await infer(client, data, *headers)
    assert answer.status == status
    if status == 200:
        assert answer == first
        assert served.slow == 2
    # The fast path goes on.
    slow = served.slow
    assert await infer(client, DATA, LENGTH) == first
    assert served.slow == slow


async def test_an_accepted_compression_is_used_for_the_same_response(served: Served, client: RawClient) -> None:
    a = np.ones((1, 500), "<f4")
    data, header = written(
        {"inputs": [described("a", a), described("b", a)], "parameters": {"binary_data_output": True}}, a, a
    )
    plain = await infer(client, data, header, model="two")
    assert len(plain.body) > 2 * a.nbytes
    answer = await infer(client, data, header, "Accept-Encoding: gzip", model="two")
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(answer.body) == plain.body
    assert answer.headers["inference-header-content-length"] == plain.headers["inference-header-content-length"]
    assert served.slow == 1
    assert served.serving.server.memory.bodies.held == 0


async def test_an_error_of_the_scheduler_is_the_response(
    served: Served, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await infer(client, DATA, LENGTH)
    scheduler = served.serving.models.find("double", "").scheduler

    def full(*args: Any) -> None:
        raise ResourceExhausted("the queue is full", retry_after_ms=1500)

    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "start", full)
        answer = await infer(client, DATA, LENGTH)
    assert (answer.status, answer.headers["retry-after"]) == (429, "2")
    assert json.loads(answer.body) == {"error": "the queue is full"}
    assert await infer(client, DATA, LENGTH) == first
    assert served.slow == 1


async def test_a_client_that_leaves_is_no_more_in_the_queue(
    served: Served, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await infer(client, DATA, LENGTH)
    scheduler = served.serving.models.find("double", "").scheduler
    dispatch = scheduler._dispatch
    queued = asyncio.Event()
    monkeypatch.setattr(scheduler, "_dispatch", lambda **named: queued.set())
    async with await served.client() as leaving:
        head = f"POST /v2/models/double/infer HTTP/1.1\r\nHost: a\r\n{LENGTH}\r\nContent-Length: {len(DATA)}\r\n\r\n"
        leaving.send(head.encode() + DATA)
        await asyncio.wait_for(queued.wait(), 30)
        assert scheduler._queue.rows == 1
    await until(lambda: scheduler._queue.rows == 0)
    await until(lambda: served.serving.server.memory.bodies.held == 0)
    monkeypatch.setattr(scheduler, "_dispatch", dispatch)
    scheduler._dispatch()
    assert (await infer(client, DATA, LENGTH)).status == 200
    assert served.slow == 1


async def test_a_new_version_is_learnt_again(served: Served, client: RawClient, models_folder: Repository) -> None:
    for _ in range(2):
        assert np.frombuffer((await infer(client, DATA, LENGTH)).body[-16:], "<f4")[1] == 2
    models_folder.put("double", onnx_files.scale(3), version=2)
    assert (await client.request("POST", "/v2/repository/models/double/load", b"{}")).status == 200
    for _ in range(2):
        assert np.frombuffer((await infer(client, DATA, LENGTH)).body[-16:], "<f4")[1] == 3
    assert served.slow == 2
    assert (await client.request("POST", "/v2/repository/models/double/unload", b"{}")).status == 200
    assert (await infer(client, DATA, LENGTH)).status in (400, 404)


async def test_what_is_known_is_bounded(served: Served, client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_infer, "_MAX_KNOWN", 4)
    fast = served.serving.server._app.http._fast_infer
    for rows in range(1, 12):
        assert (await infer(client, *doubling(np.ones((rows, 4), "<f4")))).status == 200
        assert 1 <= len(fast._known) <= 4
    fast._known.clear()
    assert (await infer(client, *doubling(a="b" * 9000))).status == 200
    assert not fast._known
