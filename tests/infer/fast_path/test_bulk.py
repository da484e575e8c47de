"""InferBulk: every entry ends as a ModelInfer call would, on its own, once."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from itertools import pairwise

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.fast_path.bulk import MAX_ENTRIES, Bulk, Entry
from services.infer.requests.request_memory import UNCOUNTED, RequestPart
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.errors import InvalidArgument, ResourceExhausted
from shoal.inference.v2 import bulk_pb2 as pb
from shoal.inference.v2 import bulk_pb2_grpc, inference_pb2
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving, request


def entry(number: int, asked: bytes, **fields: object) -> pb.InferBulkRequest.Entry:
    return pb.InferBulkRequest.Entry(number=number, request=asked, **fields)


async def outcomes_of(serving: Serving, *entries: pb.InferBulkRequest.Entry) -> dict[int, pb.InferBulkResponse.Answer]:
    call = bulk_pb2_grpc.BulkInferenceStub(serving.channel).InferBulk(
        iter([pb.InferBulkRequest(entries=entries)]), timeout=30
    )
    found = [outcome async for response in call for outcome in response.answers]
    assert len(found) == len(entries)
    return {outcome.number: outcome for outcome in found}


@pytest.fixture
async def served(serve: Callable[..., object], models_folder: Repository) -> Serving:
    models_folder.put("scale", onnx_files.scale())
    return await serve(models_folder.root)


async def test_each_entry_ends_as_a_call_would(served: Serving) -> None:
    asked = [request("scale", id=str(n), x=np.full((1, 4), n, np.float32)) for n in range(300)]
    asked[7] = request("nobody", x=np.ones((1, 4), np.float32))
    asked[9] = request("scale", x=np.ones((1, 5), np.float32))
    sent = [one.SerializeToString() for one in asked]
    sent[11] = b"\xff\xff"
    for _ in range(2):  # The second time the short way knows the form.
        found = await outcomes_of(served, *(entry(2 * n, one) for n, one in enumerate(sent)))
        for n, one in enumerate(asked):
            outcome = found[2 * n]
            if n == 11:
                assert outcome.code == 3
                assert "2 bytes are not a message" in outcome.message
                continue
            call = served.stub.ModelInfer(one)
            if await call.code() is grpc.StatusCode.OK:
                assert inference_pb2.ModelInferResponse.FromString(outcome.response) == await call
            else:
                assert (outcome.code, outcome.message) == ((await call.code()).value[0], await call.details())
                assert not outcome.HasField("response")


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (pb.InferBulkRequest(), "1 to 4096 of them in the first message, got 0"),
        (pb.InferBulkRequest(given_up=[1]), "got 0"),
        (pb.InferBulkRequest(entries=[{"number": 1}, {"number": 1}]), r"entries\[1\].number: 1 is another entry's"),
        (pb.InferBulkRequest(entries=[{"number": n} for n in range(MAX_ENTRIES + 1)]), "got 4097"),
    ],
    ids=["empty", "nothing-to-give-up", "same-number", "too-many"],
)
async def test_a_first_message_that_is_none(served: Serving, first: pb.InferBulkRequest, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=words) as refused:
        async for _ in bulk_pb2_grpc.BulkInferenceStub(served.channel).InferBulk(iter([first]), timeout=30):
            pass
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_message_and_no_message_at_all(served: Serving) -> None:
    path = "/shoal.inference.v2.BulkInference/InferBulk"
    for requests in ([b"\xff\xff"], []):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in served.channel.stream_stream(path)(iter(requests), timeout=30):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class Core:
    """Stands for the short way: the test says what becomes of each entry."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, Entry]] = []
        self.ended: list[bytes] = []

    def __call__(self, body: bytes, caller: Entry) -> None:
        name = body[5:]
        if name == b"raises":
            raise ResourceExhausted("full", retry_after_ms=70)
        if name == b"breaks":
            raise RuntimeError("a fault")
        if name == b"at once":
            caller.reply((b"at ", b"once"), 7)
            return
        self.asked.append((name, caller))
        caller.on_end = lambda: self.ended.append(name)


class Requests:
    """The messages of one call, as the test sends them."""

    def __init__(self, *entries: pb.InferBulkRequest.Entry) -> None:
        self.queue: asyncio.Queue[pb.InferBulkRequest | None] = asyncio.Queue()
        self.queue.put_nowait(pb.InferBulkRequest(entries=entries))

    async def __aiter__(self) -> AsyncIterator[pb.InferBulkRequest]:
        while (request := await self.queue.get()) is not None:
            yield request


def bulk(core: Core, requests: Requests):
    return aclosing(Bulk(core, "local/infer-0").responses(aiter(requests)))  # type: ignore[arg-type]


async def test_outcomes_share_a_message_and_name_the_instance_once() -> None:
    core = Core()
    requests = Requests(*(entry(n, name) for n, name in enumerate([b"at once", b"raises", b"breaks", b"a", b"b"])))
    async with bulk(core, requests) as responses:
        first = await anext(responses)
        assert first.instance == "local/infer-0"
        done, shed, fault = first.answers
        assert (done.number, done.response, done.code) == (0, b"at once", 0)
        assert (shed.number, shed.code, shed.message, shed.retry_after_ms) == (1, 8, "full", 70)
        assert (fault.number, fault.code, fault.message) == (
            2,
            13,
            "internal error: the log of the service has the cause",
        )
        assert not fault.HasField("retry_after_ms")
        for _, caller in core.asked:
            caller.reply((b"x",), 1)
            caller.refuse(InvalidArgument("too late"))
        second = await anext(responses)
        assert (second.instance, [outcome.number for outcome in second.answers]) == ("", [3, 4])
        assert await anext(responses, None) is None


async def test_cancelled_entries_are_abandoned() -> None:
    core = Core()
    requests = Requests(entry(1, b"a"), entry(2, b"b"), entry(3, b"c"))
    async with bulk(core, requests) as responses:
        waiting = asyncio.ensure_future(anext(responses))
        await until(lambda: len(core.asked) == 3)
        requests.queue.put_nowait(pb.InferBulkRequest(given_up=[2, 2, 99]))
        await until(lambda: core.ended == [b"b"])
        core.asked[0][1].reply((b"x",), 1)
        assert [outcome.number for outcome in (await waiting).answers] == [1]
    assert core.ended == [b"b", b"c"]  # The caller went away.


async def test_the_start_of_many_entries_leaves_iterations_of_the_loop_to_others() -> None:
    core = Core()
    requests = Requests(*(entry(n, b"%d" % n) for n in range(MAX_ENTRIES)))
    requests.queue.put_nowait(pb.InferBulkRequest(given_up=[MAX_ENTRIES - 1]))
    started = [0]
    async with bulk(core, requests) as responses:
        waiting = asyncio.ensure_future(anext(responses))
        while started[-1] < MAX_ENTRIES - 1:
            await asyncio.sleep(0)
            started.append(len(core.asked))
        assert max(after - before for before, after in pairwise(started)) <= 128
        core.asked[0][1].reply((b"x",), 1)
        await waiting
    assert b"%d" % (MAX_ENTRIES - 1) not in dict(core.asked)


async def test_a_bulk_ends_when_all_entries_are_cancelled() -> None:
    core = Core()
    requests = Requests(entry(1, b"a"))
    async with bulk(core, requests) as responses:
        waiting = asyncio.ensure_future(anext(responses, None))
        await until(lambda: len(core.asked) == 1)
        requests.queue.put_nowait(pb.InferBulkRequest(given_up=[1]))
        assert await waiting is None


async def test_deadlines_are_each_entrys_own() -> None:
    core = Core()
    requests = Requests(entry(1, b"never"), entry(2, b"soon", timeout_ms=30), entry(3, b"sooner", timeout_ms=1))
    async with bulk(core, requests) as responses:
        late = [outcome async for outcome in _first(responses, 2)]
        assert [(outcome.number, outcome.code) for outcome in late] == [(3, 4), (2, 4)]
        assert core.ended == [b"sooner", b"soon"]
        assert core.asked[0][1].deadline == math.inf


@pytest.mark.parametrize("end", ["reply", "refuse", "cancel", "expire"])
def test_the_work_on_an_entry_that_has_ended_is_freed_at_once(end: str) -> None:
    class Work:
        """Work on an entry, as a model's scheduler has it."""

        def __init__(self, one: Entry) -> None:
            self.entry = one
            one.on_end = self.abandon

        def abandon(self) -> None:
            abandoned.append(end)

    abandoned: list[str] = []
    one = Entry(lambda *_: None, entry(1, b"x"), math.inf, RequestPart(UNCOUNTED), None)
    work = Work(one)
    freed = weakref.ref(work)
    gc.collect()
    gc.disable()
    try:
        late = InvalidArgument("late")
        arguments = {"reply": ((b"y",), 1), "refuse": (late,), "cancel": (), "expire": (late,)}[end]
        getattr(one, end)(*arguments)
        del one, work
        assert freed() is None
        assert abandoned == ([end] if end in ("cancel", "expire") else [])
    finally:
        gc.enable()


async def _first(
    responses: AsyncIterator[pb.InferBulkResponse], count: int
) -> AsyncIterator[pb.InferBulkResponse.Answer]:
    while count > 0:
        for outcome in (await anext(responses)).answers:
            count -= 1
            yield outcome


async def test_retry_and_tenant_of_an_entry_act_like_headers() -> None:
    core = Core()
    async with bulk(core, Requests(entry(1, b"a", is_retry=True, tenant="t"), entry(2, b"b"))) as responses:
        waiting = asyncio.ensure_future(anext(responses))
        await until(lambda: len(core.asked) == 2)
        assert core.asked[0][1].headers == {ATTEMPT.encode(): b"2", b"x-shoal-tenant": b"t"}
        assert core.asked[1][1].headers == {}
        for _, caller in core.asked:
            caller.reply((), 0)
        await waiting


@given(st.lists(st.integers(0, 3 << 20), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_messages_stay_small_whatever_the_outcomes(sizes: list[int]) -> None:
    async def run() -> list[list[int]]:
        core = Core()
        async with bulk(core, Requests(*(entry(n, b"x") for n in range(len(sizes))))) as responses:
            waiting = asyncio.ensure_future(anext(responses))
            while len(core.asked) < len(sizes):
                await asyncio.sleep(0)
            for (_, caller), size in zip(core.asked, sizes, strict=True):
                caller.reply((bytes(size),), size)
            messages = [await waiting, *[message async for message in responses]]
            return [[len(outcome.response) for outcome in message.answers] for message in messages]

    messages = asyncio.run(run())
    assert [size for message in messages for size in message] == sizes
    assert all(len(message) == 1 or sum(message) <= 4 << 20 for message in messages)
