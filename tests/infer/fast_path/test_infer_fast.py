"""The fast path responds as the slow path does: whatever comes, before and after it has learnt."""

from __future__ import annotations

import asyncio
import gc
import math
import struct
import weakref
from contextlib import AsyncExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from opentelemetry.trace import SpanContext, TraceFlags

from mesh.rpc.fast_spans import FastSpan
from services.infer import core
from services.infer.core import InferenceServer
from services.infer.fast_path.infer_fast import FastInfer
from services.infer.fast_path.large_request import RequestParser, shared_bytes
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.requests import request as reading
from services.infer.requests.request_memory import Uncounted
from services.infer.requests.response import kept
from services.infer.rpc import _is_retry
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.crash_guard import ATTEMPT
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources.repository import scan
from shoal.access.caller_header import JOB_RETRY_HEADER
from shoal.errors import InvalidArgument, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.ensembles.conftest import step, written
from tests.long_form import by_form

DTYPES = {"FP32": np.float32, "INT64": np.int64}


class Asked(Uncounted):
    """Stands for the exchange of a front: keeps what the call ends with."""

    def __init__(self, headers: dict[bytes, bytes] | None = None, span: FastSpan | None = None) -> None:
        self.headers = headers or {}
        self.span = span
        self.deadline = math.inf
        self.on_end = None
        self.is_over = False
        self.end: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.slow: tuple[float, dict[str, object]] | None = None

    def reply(self, parts, size) -> None:
        data = b"".join(parts)
        assert len(data) == size
        self.is_over, self.on_end = True, None
        self.end.set_result(pb.ModelInferResponse.FromString(data))

    def reply_slow(self, parts, size, seconds, about) -> None:
        self.slow = seconds, about
        self.reply(parts, size)

    def refuse(self, error: BaseException, seconds: float = 0.0, about: object = None) -> None:
        self.is_over, self.on_end = True, None
        self.end.set_result(error)


class Server:
    """Both ways over the same models."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.core = InferenceServer(models, "test/infer-0")
        self.short = FastInfer(self.core, models)

    async def short_end(self, data: bytes, span: FastSpan | None = None):
        return await self.asked(Asked(span=span), data)

    async def asked(self, asked: Asked, data: bytes):
        try:
            self.short(struct.pack(">BI", 0, len(data)) + data, asked)
        except ShoalError as err:  # The exchange refuses what its handler raises.
            return err
        return await asyncio.wait_for(asked.end, 60)

    async def long_end(self, data: bytes):
        try:
            request = pb.ModelInferRequest.FromString(data)
        except DecodeError:
            return InvalidArgument("no message")
        try:
            return await self.core.infer(request)
        except ShoalError as err:
            return err

    async def agree(self, data: bytes) -> object:
        """The end of this request, which is the same on both ways."""
        short, long = await self.short_end(data), await self.long_end(data)
        if isinstance(long, Exception):
            assert type(short) is type(long), (short, long)
            if not str(long).startswith("no message"):
                assert str(short) == str(long)
        else:
            assert short == long
        return short


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, model in {
        "double": onnx_files.scale(),
        "two": onnx_files.add(),
        "whole": onnx_files.identity(TensorProto.INT64),
        "flag": onnx_files.identity(TensorProto.BOOL),
        "words": onnx_files.identity(TensorProto.STRING),
    }.items():
        (root / f"{name}.onnx").write_bytes(model.SerializeToString())
    (root / "chain/1").mkdir(parents=True)
    steps = step("double", {"x": "x"}, {"y": "m"}), step("double", {"x": "m"}, {"y": "y"})
    (root / "chain/config.pbtxt").write_text(written(*steps))
    return root


def both_ways(folder, work):
    async def run():
        async with AsyncExitStack() as stack:
            models = await stack.enter_async_context(Models(LoadContext.of(OnnxRuntime(), QueueLimits())))
            models.want(scan(folder))
            await models.settled()
            return await work(Server(models))

    return asyncio.run(run())


def request(model="double", rows=1, *, id="", version="", outputs=(), value=1.0, dtype="FP32", inputs=("x",), width=4):
    asked = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for number, name in enumerate(inputs):
        asked.inputs.add(name=name, datatype=dtype, shape=[rows, width])
        values = np.full((rows, width), value + number, DTYPES[dtype])
        asked.raw_input_contents.append(values.tobytes())
    for name in outputs:
        asked.outputs.add(name=name)
    return asked


REQUESTS = st.one_of(
    st.builds(
        request,
        rows=st.integers(0, 70),
        id=st.sampled_from(["", "a", "x" * 127, "x" * 128, "ü", "7"]),
        version=st.sampled_from(["", "1", "2", "x"]),
        outputs=st.sampled_from([(), ("y",), ("z",), ("y", "y")]),
        value=st.floats(-9, 9, width=32),
        width=st.sampled_from([4, 4, 4, 3]),
    ),
    st.builds(
        request,
        model=st.just("two"),
        rows=st.integers(1, 5),
        inputs=st.sampled_from([("a", "b"), ("b", "a"), ("a",), ("a", "b", "a")]),
        outputs=st.sampled_from([(), ("difference",), ("sum", "difference"), ("difference", "sum")]),
        width=st.integers(0, 300),
    ),
    st.builds(request, model=st.just("whole"), rows=st.integers(1, 3), dtype=st.just("INT64"), value=st.integers(0, 9)),
    st.builds(
        request,
        model=st.just("chain"),
        rows=st.integers(0, 65),
        id=st.sampled_from(["", "a"]),
        outputs=st.sampled_from([(), ("y",), ("m",)]),
        width=st.sampled_from([4, 4, 4, 3]),
    ),
    st.builds(request, model=st.just("nobody")),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=12))
def test_fast_and_slow_path_agree_before_and_after_learning(folder, requests):
    async def work(server):
        for asked in [*requests, *requests]:
            await server.agree(asked.SerializeToString())

    both_ways(folder, work)


@settings(max_examples=by_form(60, 150), suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_fast_and_slow_path_agree_about_bytes_close_to_a_known_message(folder, data):
    async def work(server):
        known = [request(id="i"), request(rows=3), request("two", 2, inputs=("a", "b"), width=200)]
        bodies = [asked.SerializeToString() for asked in known]
        for body in bodies:
            await server.agree(body)
        for _ in range(8):
            changed = bytearray(data.draw(st.sampled_from(bodies)))
            for _ in range(data.draw(st.integers(1, 3))):
                at = data.draw(st.integers(0, len(changed) - 1))
                match data.draw(st.sampled_from(["set", "cut", "add", "drop"])):
                    case "set":
                        changed[at] = data.draw(st.integers(0, 255))
                    case "cut" if at:
                        del changed[at:]
                    case "add":
                        changed[at:at] = data.draw(st.binary(min_size=1, max_size=6))
                    case "drop" if len(changed) > 1:
                        del changed[at]
            await server.agree(bytes(changed))

    both_ways(folder, work)


def test_a_learnt_template_is_used_and_each_request_gets_its_own_response(folder):
    async def work(server):
        for value in range(40):
            asked = request(id=str(value), value=float(value))
            end = await server.agree(asked.SerializeToString())
            assert end.id == str(value)
            assert np.frombuffer(end.raw_output_contents[0], np.float32).tolist() == [2.0 * value] * 4
        named = server.short._by_name
        assert len(named) == 1
        assert sum(len(one.templates) for one in named.values()) == 1

    both_ways(folder, work)


@pytest.mark.parametrize("model", ["double", "chain"])
def test_a_sampled_request_is_an_exemplar_on_both_paths(folder, model):
    def traces(server, of):
        found = server.models.find(of, "").statistics.exemplars
        kept = (
            [] if found is None else [found.total, found.queue, found.gather, found.compute, found.scatter, found.rows]
        )
        if found is not None and of == "double":
            kept.append(found.forming)
        # The step of an ensemble writes no response.
        if found is not None and of == model:
            kept.append(found.serialise)
        return [{each.trace_id for each in exemplars.read() if each} for exemplars in kept]

    async def work(server):
        data = request(model).SerializeToString()
        for number, path in enumerate(("slow", "fast"), 1):
            await server.short_end(data)
            assert traces(server, model) == traces(server, "double") == [], path
            span = FastSpan(SpanContext(number, 7, False, TraceFlags(TraceFlags.SAMPLED)), None, 0)
            # Without a learnt template, a request takes the slow path.
            if path == "slow":
                server.short = FastInfer(server.core, server.models)
            await server.short_end(data, span)
            # The step of an ensemble leads to the request, too.
            assert traces(server, model) == [{number}] * (8 if model == "double" else 7), path
            assert traces(server, "double") == [{number}] * (8 if model == "double" else 7), path
            for each in ("double", model):
                server.models.find(each, "").statistics.exemplars = None

    both_ways(folder, work)


def test_a_request_that_takes_longer_than_its_model_may_is_replied_as_a_slow_one(folder):
    async def work(server):
        data = request(rows=3).SerializeToString()
        version = server.models.find("double", "")
        version.slow_ns = -1
        # The first one on the slow path, whose request is learnt.
        slow = [Asked(), Asked()]
        for asked in slow:
            await server.asked(asked, data)
        assert [asked.slow[1]["shoal.model"] for asked in slow] == ["double"] * 2
        assert ["shoal.compute_ms" in asked.slow[1] for asked in slow] == [False, True]
        version.slow_ns = math.inf
        fast = Asked()
        await server.asked(fast, data)
        assert fast.slow is None

    both_ways(folder, work)


def test_each_text_message_is_read_once(folder, monkeypatch):
    seen = []

    def read(asked, signature):
        seen.append(asked.id)
        return whole(asked, signature)

    whole = reading.read_steps
    monkeypatch.setattr(core, "read_steps", read)
    monkeypatch.setattr(reading, "read_steps", read)

    async def work(server):
        for n in range(3):
            asked = pb.ModelInferRequest(model_name="words", id=str(n))
            asked.inputs.add(name="x", datatype="BYTES", shape=[1, 4])
            asked.raw_input_contents.append(4 * (struct.pack("<I", 2) + b"ab"))
            end = await server.short_end(asked.SerializeToString())
            assert end.raw_output_contents[0] == asked.raw_input_contents[0]

    both_ways(folder, work)
    assert seen == ["0", "1", "2"]


def test_many_shapes_and_names_fill_no_memory(folder):
    async def work(server):
        for rows in range(1, 65):
            await server.short_end(request(rows=rows).SerializeToString())
        for width in range(200):
            await server.short_end(request("two", inputs=("a", "b"), width=width).SerializeToString())
        for number in range(3000):
            await server.short_end(request(f"no-{number}").SerializeToString())
        assert len(server.short._by_name) <= 3
        assert all(len(named.templates) <= 64 for named in server.short._by_name.values())

    both_ways(folder, work)


def test_heads_with_invented_parameters_fill_no_memory(folder, monkeypatch):
    def parametrised(size):
        asked = request()
        asked.inputs[0].parameters["invented"].string_param = "x" * size
        return asked.SerializeToString()

    async def work(server):
        def learnt():
            return [len(head) for named in server.short._by_name.values() for head in named.templates]

        await server.agree(parametrised(100_000))
        assert not learnt()
        monkeypatch.setattr("services.infer.fast_path.infer_fast._MAX_LEARNT_BYTES", 100_000)
        for size in range(15_000, 15_060):
            await server.agree(parametrised(size))
            assert 15_000 < sum(learnt()) <= 100_000

    both_ways(folder, work)


@pytest.mark.parametrize(
    "body", [b"", b"\x0a", b"\x0a\xff", b"\x0a\x06double\x1a", b"\x0a\x06double\x12", b"\x0a\x06double"]
)
def test_a_malformed_message_is_rejected_as_on_the_slow_path(folder, body):
    async def work(server):
        await server.agree(request().SerializeToString())
        assert isinstance(await server.agree(body), ShoalError)

    both_ways(folder, work)


def test_an_unloaded_or_replaced_model_is_not_used(folder):
    async def work(server):
        body = request().SerializeToString()
        await server.agree(body)
        await server.agree(body)
        before = server.models.find("double", "")
        server.models.want([])
        end = await server.agree(body)
        await server.models.settled()
        assert isinstance(end, ShoalError)
        server.models.want(scan(folder))
        await server.models.settled()
        assert server.models.find("double", "") is not before
        assert isinstance(await server.agree(body), pb.ModelInferResponse)
        assert isinstance(await server.agree(body), pb.ModelInferResponse)

    both_ways(folder, work)


def test_numbers_are_views_of_the_request(folder):
    """Nothing is copied between the wire and the batch."""

    async def work(server):
        asked = request("two", 1, inputs=("a", "b"), width=100_000)
        body = asked.SerializeToString()
        framed = struct.pack(">BI", 0, len(body)) + body
        await server.agree(body)
        (named,) = server.short._by_name.values()
        ((head, template),) = named.templates.items()
        call = template.request(framed, framed.index(head) + len(head))
        memory = np.frombuffer(framed, np.uint8)
        assert all(np.may_share_memory(array, memory) for array in call.inputs.values())

    both_ways(folder, work)


def typed_input(*contents: bytes, name: bytes = b"\x0a\x01x", is_first: bool = False) -> bytes:
    """Return a request for `double` with an input [1, 4] of FP32, whose contents are given in their wire form."""
    fields = [name, b"\x12\x04FP32", b"\x1a\x02\x01\x04"]
    fields[0 if is_first else 3 : 0] = [bytes([0x2A, len(each)]) + each for each in contents]
    made = b"".join(fields)
    return b"\x0a\x06double\x2a" + bytes([len(made)]) + made


def bodies() -> dict[str, bytes]:
    """Requests of many forms, good and bad."""
    plain, two, asked = request(), request("two", 3, inputs=("a", "b")), request(id="x" * 200)
    asked.parameters["custom"].string_param = "more"
    words = pb.ModelInferRequest(model_name="words", raw_input_contents=[b"\1\0\0\0a\2\0\0\0bc"])
    words.inputs.add(name="x", datatype="BYTES", shape=[2])
    typed = pb.ModelInferRequest(model_name="double")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 4], contents=pb.InferTensorContents(fp32_contents=[1] * 4))
    both, many, wrong = pb.ModelInferRequest(), request(), request(width=3)
    both.CopyFrom(typed)
    both.raw_input_contents.append(bytes(16))
    many.raw_input_contents.append(b"")
    good = {"plain": plain, "two": two, "parameters": asked, "words": words, "typed": typed}
    found = {
        name: made.SerializeToString() for name, made in {**good, "both": both, "many": many, "wrong": wrong}.items()
    }
    data = found["two"]
    numbers = b"\x32\x10" + struct.pack("<4f", 1, 2, 3, 4)
    found |= {
        "packed": typed_input(numbers),
        "packed, before other fields": typed_input(numbers, is_first=True),
        "packed, and a second input": typed_input(numbers) + typed_input(numbers, name=b"")[8:],
        "packed, and raw": typed_input(numbers) + b"\x3a\x10" + bytes(16),
        "packed, too few": typed_input(b"\x32\x0c" + bytes(12)),
        "packed, cut number": typed_input(b"\x32\x0f" + bytes(15)),
        "packed, of another type": typed_input(b"\x3a\x20" + bytes(32)),
        "packed, in two pieces": typed_input(2 * (b"\x32\x08" + bytes(8))),
        "packed, in two contents": typed_input(b"\x32\x08" + bytes(8), b"\x32\x08" + bytes(8)),
        "packed, and another field": typed_input(numbers + b"\x18\x05"),
        "packed, longer than its input": typed_input(b"\x32\x7f" + bytes(16)),
        "not packed": typed_input(4 * b"\x35\0\0\0\0"),
    }
    return found | {
        "raw first": data[-50:] + data[:-50],
        "cut": data[:-3],
        "tail": data + b"\x3a",
        "too long": data + b"\x3a\xff\xff\xff\xff\x0f",
        "unknown fields": b"\x78\x05" + data + b"\x7a\x01x",
        "reserved": data + b"\x07",
        "empty": b"",
    }


@pytest.mark.parametrize("form", bodies())
def test_a_large_request_whose_raw_contents_are_cut_out_responds_as_any_other(folder, monkeypatch, form):
    monkeypatch.setattr("services.infer.fast_path.large_request.LARGE_BYTES", 0)
    monkeypatch.setattr("services.infer.fast_path.large_request._LARGE_INPUT_BYTES", 0)

    async def work(server):
        for _ in range(2):
            await server.agree(bodies()[form])

    both_ways(folder, work)


def test_typed_numbers_of_a_large_request_are_never_copied(folder):
    async def work(server):
        asked = pb.ModelInferRequest(model_name="two")
        for name in "ab":
            values = pb.InferTensorContents(fp32_contents=np.arange(600_000, dtype=np.float32))
            asked.inputs.add(name=name, datatype="FP32", shape=[1, 600_000], contents=values)
        body = asked.SerializeToString()
        framed = struct.pack(">BI", 0, len(body)) + body
        message = RequestParser()(framed, 5)
        read = reading.read(message, server.models.find("two", "").loaded.model.signature)
        memory = np.frombuffer(framed, np.uint8)
        assert all(np.may_share_memory(array, memory) for array in read.inputs.values())
        assert read.inputs["b"][0, -1] == 599_999
        assert shared_bytes(message) == 2 * 4 * 600_000
        await server.agree(body)

    both_ways(folder, work)


def test_numbers_of_a_large_request_are_never_copied(folder):
    async def work(server):
        asked = request("two", 1, inputs=("a", "b"), width=600_000)
        asked.parameters["custom"].string_param = "no template has parameters"
        body = asked.SerializeToString()
        framed = struct.pack(">BI", 0, len(body)) + body
        message = RequestParser()(framed, 5)
        read = reading.read(message, server.models.find("two", "").loaded.model.signature)
        memory = np.frombuffer(framed, np.uint8)
        assert all(np.may_share_memory(array, memory) for array in read.inputs.values())
        assert shared_bytes(message) == 2 * 4 * 600_000
        assert shared_bytes(message.inputs[0]) == 0
        await server.agree(body)

    both_ways(folder, work)


def test_large_outputs_are_not_copied_on_either_path(folder):
    async def work(server):
        body = request("two", 1, inputs=("a", "b"), width=600_000).SerializeToString()
        parts = []

        class Keeping(Asked):
            def reply(self, found, size):
                parts.append(list(found))
                super().reply(found, size)

        for _ in range(3):
            exchange = Keeping()
            server.short(struct.pack(">BI", 0, len(body)) + body, exchange)
            response = await asyncio.wait_for(exchange.end, 60)
            assert response == await server.core.infer(pb.ModelInferRequest.FromString(body))
            arrays = [part for part in parts[-1] if isinstance(part, np.ndarray)]
            assert sum(array.nbytes for array in arrays) == sum(map(len, response.raw_output_contents))
        # The first request is on the slow path.
        assert server.short._by_name

    both_ways(folder, work)


@pytest.mark.parametrize(
    ("headers", "is_checked"),
    [({}, False), ({ATTEMPT: "1"}, False), ({ATTEMPT: "2"}, True), ({JOB_RETRY_HEADER: "1"}, True)],
    ids=["first", "first-of-the-mesh", "repeated-by-the-mesh", "attempt-of-a-job"],
)
def test_a_request_that_may_have_run_is_checked_on_both_paths(folder, headers, is_checked):
    checked = []

    class Guard:
        async def checked(self, model, request):
            checked.append(model)
            return request

    async def work(server):
        server.core = InferenceServer(server.models, "test/infer-0", crash_guard=Guard())
        server.short = FastInfer(server.core, server.models)
        data = request("double").SerializeToString()
        await server.short_end(data)
        assert server.short._by_name
        assert checked == []
        exchange = Asked({name.encode(): value.encode() for name, value in headers.items()})
        server.short(struct.pack(">BI", 0, len(data)) + data, exchange)
        await asyncio.wait_for(exchange.end, 60)
        context = SimpleNamespace(invocation_metadata=lambda: tuple(headers.items()))
        return _is_retry(context)

    assert both_ways(folder, work) is is_checked
    assert bool(checked) is is_checked


def test_a_large_output_that_is_a_view_is_copied(folder):
    """A view of a batch would keep the batch, and one of shared memory is used for the next batch."""
    whole = np.zeros((4, 600_000), np.float32)
    assert kept(whole) is whole
    assert isinstance(kept(whole[1:2]), bytes)
    assert isinstance(kept(np.frombuffer(bytearray(8), np.float32)), bytes)


def test_a_request_is_freed_when_it_is_answered_at_once(folder):
    """Its body does not wait for a garbage collection."""

    async def work(server):
        data = request("double").SerializeToString()
        body = struct.pack(">BI", 0, len(data)) + data
        answered_at_once, left = 0, []
        gc.collect()
        gc.disable()
        try:
            # A short model runs on the event loop, once its time is known, while requests arrive one at a time.
            async with asyncio.timeout(30):
                while answered_at_once < 3:
                    exchange = Asked()
                    server.short(body, exchange)
                    answered_at_once += exchange.is_over
                    await exchange.end
                    left.append(weakref.ref(exchange))
                    del exchange
                    await asyncio.sleep(0.002)
                while any(each() is not None for each in left):
                    await asyncio.sleep(0.001)
        finally:
            gc.enable()

    both_ways(folder, work)
