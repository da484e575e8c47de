"""Callers of the soak test: random requests, the statuses that each may get, and checks of the answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc

Array = Any
Check = Callable[[pb.ModelInferResponse], None]

# Longer than any answer takes: a call without an answer after this time counts as lost.
_LOST_AFTER_S = 60.0

_TENANTS = ("", "", "ant", "bee", "cat")
_COMPRESSIONS = (None, None, grpc.Compression.Gzip, grpc.Compression.Deflate)
# Statuses that a cancelled call, and one with a short deadline, may get instead of a correct answer.
_IF_CANCELLED = {grpc.StatusCode.CANCELLED}
_IF_SHORT_DEADLINE = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}


class Wrong(Exception):
    """An answer does not match its request, or the status is impossible for the request."""


@dataclass
class Tally:
    """Outcomes of all calls."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of calls by kind and outcome."""
    answered: Counter[str] = field(default_factory=Counter)
    """Number of correct answers by model."""
    wrong: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str) -> None:
        self.outcomes[kind, outcome] += 1


@dataclass(frozen=True)
class Question:
    """A request with the check of its answer."""

    model: str
    request: pb.ModelInferRequest
    check: Check


class Caller:
    """Caller with one action at a time, chosen at random."""

    def __init__(self, address: str, seed: int, tally: Tally) -> None:
        self._address = address
        self._rng = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._tally = tally
        self._serial = 0

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Call until `is_over()`; sometimes drop the connection with calls in flight, and open a new one."""
        while not is_over():
            async with connect(self._address) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                for _ in range(self._rng.randint(50, 400)):
                    if is_over():
                        return
                    await self._one(stub)
                await self._leave(stub)

    async def _one(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        kind, act = self._rng.choices(_ACTS, _WEIGHTS)[0]
        try:
            await asyncio.wait_for(act(self, stub), _LOST_AFTER_S)
        except Wrong as err:
            self._tally.add(kind, "WRONG")
            self._tally.wrong.append(f"{kind}: {err}")
        except TimeoutError:
            self._tally.add(kind, "LOST")
            self._tally.wrong.append(f"{kind}: no answer within {_LOST_AFTER_S:.0f} s")
        except grpc.aio.AioRpcError as err:
            self._tally.add(kind, err.code().name)
            self._tally.wrong.append(f"{kind}: {err.code().name} {(err.details() or '')[:200]}")

    async def ask(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        question = self._question()
        answer = await stub.ModelInfer(question.request, timeout=_LOST_AFTER_S, **self._extras())
        self._check("unary", question, answer)

    async def ask_with_deadline(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        """Send a request with a short deadline."""
        question = self._question("slow" if self._rng.random() < 0.6 else "")
        seconds = self._rng.choice((0.0005, 0.002, 0.01, 0.05))
        if self._rng.random() < 0.3:
            question.request.parameters["timeout"].int64_param = int(seconds * 1e6)
            seconds = _LOST_AFTER_S
        call = stub.ModelInfer(question.request, timeout=seconds)
        await self._answer_or("deadline", question, call, _IF_SHORT_DEADLINE)

    async def cancel(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        question = self._question(self._rng.choice(("slow", "slow", "triple", "python", "")))
        call = stub.ModelInfer(question.request, timeout=_LOST_AFTER_S, **self._extras())
        asyncio.get_running_loop().call_later(self._rng.uniform(0, 0.01), call.cancel)
        await self._answer_or("cancelled", question, call, _IF_CANCELLED)

    async def send_bad(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        """Send a bad request, which must be rejected with the right status."""
        request, code = self._bad_request()
        try:
            await stub.ModelInfer(request, timeout=_LOST_AFTER_S)
        except grpc.aio.AioRpcError as err:
            if err.code() is not code or not err.details():
                raise Wrong(f"expected {code.name}, got {err.code().name} {err.details()}") from err
            self._tally.add("bad", code.name)
        else:
            raise Wrong(f"a bad request was answered: {str(request)[:200]}")

    async def stream(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        """Send a stream of good and bad requests; sometimes cancel it midway."""
        sent: list[Question | None] = []

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            for _ in range(self._rng.randint(1, 12)):
                good = self._rng.random() < 0.85
                sent.append(self._question() if good else None)
                yield sent[-1].request if sent[-1] is not None else self._bad_request()[0]

        call, stay = stub.ModelStreamInfer(requests(), timeout=_LOST_AFTER_S), self._rng.random() < 0.8
        count = 0
        async for answer in call:
            question, count = sent[count], count + 1
            if question is None:
                if not answer.error_message:
                    raise Wrong("a bad request of a stream was answered")
                continue
            if answer.error_message:
                raise Wrong(f"a good request of a stream was rejected: {answer.error_message}")
            self._check("stream", question, answer.infer_response)
            if not stay:
                call.cancel()
                self._tally.add("stream", "left")
                return
        if count != len(sent):
            raise Wrong(f"{len(sent)} requests on a stream, {count} answers")

    async def count(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        """Call a decoupled model; sometimes cancel midway."""
        many, leave_at = self._rng.randint(0, 40), self._rng.choice((None, None, 0, 5))
        request = _request("counting", n=np.array([many], np.int32))
        call = stub.ModelStreamInfer(_only(request), timeout=_LOST_AFTER_S)
        got = []
        async for answer in call:
            if answer.error_message:
                raise Wrong(f"decoupled: {answer.error_message}")
            if answer.infer_response.outputs:
                got.append(int(_output(answer.infer_response, "i")[0]))
            if leave_at is not None and len(got) > leave_at:
                call.cancel()
                self._tally.add("decoupled", "left")
                return
        if got != list(range(many)):
            raise Wrong(f"decoupled: requested {many}, got {got[:50]}")
        self._tally.add("decoupled", "OK")

    async def _leave(self, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
        """Start calls that are in flight when the connection is closed."""
        for _ in range(self._rng.randint(0, 5)):
            question = self._question("slow")
            asyncio.ensure_future(stub.ModelInfer(question.request)).add_done_callback(_ignore_result)
        await asyncio.sleep(self._rng.uniform(0, 0.005))
        self._tally.add("connection", "left")

    async def _answer_or(
        self, kind: str, question: Question, call: Awaitable[pb.ModelInferResponse], may: set[grpc.StatusCode]
    ) -> None:
        """Wait for a correct answer or one of the statuses in `may`."""
        try:
            answer = await call
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            self._tally.add(kind, "CANCELLED")
        except grpc.aio.AioRpcError as err:
            if err.code() not in may:
                raise
            self._tally.add(kind, err.code().name)
        else:
            self._check(kind, question, answer)

    def _check(self, kind: str, question: Question, answer: pb.ModelInferResponse) -> None:
        if answer.id != question.request.id or answer.model_name != question.model:
            raise Wrong(f"called {question.model} {question.request.id}, got {answer.model_name} {answer.id}")
        question.check(answer)
        self._tally.answered[question.model] += 1
        self._tally.add(kind, "OK")

    def _extras(self) -> dict[str, Any]:
        tenant = self._rng.choice(_TENANTS)
        return {
            "metadata": (("x-shoal-tenant", tenant),) if tenant else (),
            "compression": self._rng.choice(_COMPRESSIONS),
        }

    def _question(self, model: str = "") -> Question:
        model = model or self._rng.choice(_MODELS)
        self._serial += 1
        rows = self._rng.choice((1, 1, 1, 2, 5))
        match model:
            case "text":
                words = np.array([[self._numbers.bytes(n).hex().encode() for n in (1, 0, 9)]] * rows, object)
                request, check = _request(model, x=words), _same("y", words)
            case "table":
                i = self._numbers.integers(0, 3, (rows, 1))
                request, check = _request(model, i=i), _same("y", (10 * (i + 1)).astype(np.float32))
            case "fixed":
                x = self._numbers.random((2, 3), np.float32)
                request, check = _request(model, x=x), _same("y", 5 * x)
            case "triple":
                # Few values, so that many requests are equal; and several shapes with the same bytes.
                x = np.full(self._rng.choice(((1, 4), (2, 2), (4, 1))), self._rng.randint(0, 9), np.float32)
                request, check = _request(model, x=x), _same("y", 3 * x)
            case _:
                x = self._numbers.random((rows, 4), np.float32)
                request, check = _request(model, x=x), _same("y", _OF[model](x))
        request.id = f"{id(self):x}-{self._serial}"
        if self._rng.random() < 0.1:
            request.parameters["explain"].bool_param = True
        return Question(model, request, check)

    def _bad_request(self) -> tuple[pb.ModelInferRequest, grpc.StatusCode]:
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        request = _request("double", x=self._numbers.random((1, 4), np.float32))
        match self._rng.randint(0, 6):
            case 0:
                request.model_name = "nobody"
                return request, grpc.StatusCode.NOT_FOUND
            case 1:
                request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
            case 2:
                request.inputs[0].shape[:] = [1, 5]
            case 3:
                request.inputs[0].datatype = "INT32"
            case 4:
                request.outputs.add(name="nothing")
            case 5:
                request.parameters["triton_mine"].bool_param = True
            case _:
                return _request("table", i=np.array([[99]])), grpc.StatusCode.INTERNAL
        return request, invalid


_OF: dict[str, Callable[[Array], Array]] = {
    "double": lambda x: 2 * x,
    "slow": lambda x: 2 * x,
    "reloaded": lambda x: 7 * x,
    "python": lambda x: x + 1,
}
_MODELS = ("double", "double", "triple", "triple", "fixed", "text", "table", "reloaded", "python", "slow")
_ACTS = (
    ("unary", Caller.ask),
    ("deadline", Caller.ask_with_deadline),
    ("cancelled", Caller.cancel),
    ("bad", Caller.send_bad),
    ("stream", Caller.stream),
    ("decoupled", Caller.count),
)
_WEIGHTS = (60, 10, 10, 8, 8, 4)

_TYPES = {"f4": "FP32", "i8": "INT64", "i4": "INT32"}


def _request(model: str, **arrays: Array) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        if array.dtype == object:
            made.inputs.add(name=name, datatype="BYTES", shape=array.shape)
            parts = (len(each).to_bytes(4, "little") + each for each in array.reshape(-1))
            made.raw_input_contents.append(b"".join(parts))
        else:
            made.inputs.add(name=name, datatype=_TYPES[array.dtype.str[1:]], shape=array.shape)
            made.raw_input_contents.append(array.tobytes())
    return made


def _output(answer: pb.ModelInferResponse, name: str) -> Array:
    index = [output.name for output in answer.outputs].index(name)
    meta, raw = answer.outputs[index], answer.raw_output_contents[index]
    if meta.datatype == "BYTES":
        parts, at = [], 0
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 4], "little")
            parts.append(raw[at + 4 : at + 4 + size])
            at += 4 + size
        return np.array(parts, object).reshape(tuple(meta.shape))
    kinds = {name: kind for kind, name in _TYPES.items()}
    return np.frombuffer(raw, kinds[meta.datatype]).reshape(tuple(meta.shape))


def _same(name: str, expected: Array) -> Check:
    def check(answer: pb.ModelInferResponse) -> None:
        got = _output(answer, name)
        if got.shape != expected.shape or not np.array_equal(got, expected):
            raise Wrong(f"{answer.model_name}: expected {expected.tolist()}, got {got.tolist()}")

    return check


async def _only(request: pb.ModelInferRequest) -> AsyncIterator[pb.ModelInferRequest]:
    yield request


def _ignore_result(task: asyncio.Future[Any]) -> None:
    # Read the exception, so that asyncio does not log it: the call was abandoned on purpose.
    if not task.cancelled():
        task.exception()
