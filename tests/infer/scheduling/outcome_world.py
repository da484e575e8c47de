"""A small server in simulated time: real calls, schedulers, versions, bulks and cache; simulated models and clients.

Between any two callbacks of the event loop, and inside any response, a test may disconnect, cancel, expire or fail.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from mesh.rpc.fast_call import Deadlines, FastCall
from services.infer.ensembles import flow
from services.infer.ensembles import graph as graphs
from services.infer.ensembles.scheduler import EnsembleScheduler
from services.infer.fast_path.bulk import Bulk, Entry
from services.infer.fast_path.infer_fast import _FastRequest
from services.infer.fast_path.template import Template
from services.infer.loading import model_config
from services.infer.loading.loading import Loaded
from services.infer.loading.model_config import Completed
from services.infer.model_files.wanted_models import WantedVersion
from services.infer.model_process.channel import Message
from services.infer.models.version import State, Version
from services.infer.requests.parameters import Parameters
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.response_cache.cache import ResponseCache
from services.infer.response_cache.key import ResponseKeys
from services.infer.response_cache.store import ResponseStore
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.delivery import OutcomeQueue
from services.infer.scheduling.execution import Execution
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.scheduler import Scheduler
from services.infer.sequences.execution import SequenceExecution
from services.infer.sequences.scheduler import SequenceScheduler
from shoal.inference.v2 import bulk_pb2
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2 as config_pb
from tests.infer.ensembles.conftest import parameter, step, tensor, written
from tests.infer.scheduling import virtual_time
from tests.infer.scheduling.virtual_time import SIGNATURE, Model, SimulatedWorker, VirtualLoop, Y
from tests.infer.sequences import simulated

TARGETS = ("plain", "ordered", "quick", "rows", "quick rows", "nested", "sequence", "cached", "decoupled")
"""Models of the world. rows and quick rows: ensembles that call `ordered` and `quick` for each row."""
FAST = TARGETS[:6]
"""The targets that the fast path serves, too."""


class SteppedLoop(VirtualLoop):
    """Calls `on_step` after each callback."""

    on_step: Callable[[], None] = staticmethod(lambda: None)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        return super().call_soon(self._run_step, callback, args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return super().call_at(when, self._run_step, callback, args, context=context)

    def _run_step(self, callback: Any, args: Any) -> None:
        callback(*args)
        self.on_step()


class QuickModel(Model):
    """Runs on the event loop once its cost is known."""

    only_computes = True


class Worker(SimulatedWorker):
    """May be closed while it runs a batch, as a thread may."""

    def close(self) -> None:
        self._sleep_on()


class Client:
    """The stream of one call, and what the client has received on it."""

    def __init__(self, world: World, number: int, timeout_ms: int) -> None:
        self.world, self.number = world, number
        headers = {b"grpc-timeout": b"%dm" % timeout_ms} if timeout_ms else {}
        self.head = SimpleNamespace(by_name=headers, path="/call")
        self.responses: list[bytes | BaseException] = []
        self.is_cancelled = self.is_expired = False
        self.held, self.sender = 0, number % 3

    def hold(self, size: int) -> bool:
        return True

    reserve = hold

    def release(self, size: int) -> None: ...

    def has_room(self, size: int) -> bool:
        return True

    def consumed(self, size: int) -> None: ...

    def respond(self, head: bytes, body: bytes = b"", trailers: bytes = b"") -> None:
        assert not self.is_cancelled
        self.responses.append(body if body else self.world.errors.pop())
        self.world.on_moment()


class RecordedCall(FastCall):
    """A call whose error the test can read."""

    def refuse(self, error: BaseException, seconds: float = 0.0, about: object = None) -> None:
        if not self.is_over:
            self._app.errors.append(error)
        super().refuse(error)


class RecordedEntry:
    """Outcomes of one entry of a bulk."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.responses: list[bytes | int] = []
        self.is_given_up = False


class Stream:
    """The process of a decoupled model: two responses for each request, then the end."""

    def __init__(self) -> None:
        self.process = SimpleNamespace(end="killed", is_own_crash=lambda: True, kill=lambda why: None)
        self.is_crash_recorded = False
        self._handlers: dict[int, Callable[[Message | None], None]] = {}
        self._count = 0

    def start(self, header: Any, parts: Any, run: Any, handler: Callable[[Message | None], None]) -> int:
        self._count += 1
        self._handlers[self._count] = handler
        x = np.concatenate([chunk for part in parts for chunk in part.chunks]).view(np.float64).reshape(-1, 1)
        loop = asyncio.get_running_loop()
        for n, delay_s in enumerate((0.001, 0.003)):
            loop.call_later(delay_s, self._send, self._count, {"op": "response"}, [("y", "FP64", 2 * x + 1 + n)])
        loop.call_later(0.004, self._send, self._count, {"op": "end"}, [])
        return self._count

    def _send(self, number: int, header: dict[str, Any], tensors: list[Any]) -> None:
        handler = self._handlers.pop(number, None) if header["op"] == "end" else self._handlers.get(number)
        if handler is not None:
            handler(Message(header, tensors))

    def send_control(self, number: int, op: str, **fields: Any) -> None:
        if op == "cancel":
            asyncio.get_running_loop().call_later(0.001, self._send, number, {"op": "end"}, [])


class World:
    """The server, and the calls of the test."""

    def __init__(self, loop: SteppedLoop) -> None:
        self.loop, self.clock = loop, loop.time
        self.outcomes = OutcomeQueue()
        self.versions: dict[str, Version] = {}
        self.models: dict[str, Any] = {}
        self.calls: dict[int, FastCall] = {}
        self.clients: dict[int, Client] = {}
        self.entries: dict[int, RecordedEntry] = {}
        self.given_up: asyncio.Queue[int] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self.actions: dict[int, Callable[[], None]] = {}
        # Calls that reached each model: not those whose task was cancelled before its first step.
        self.begun: Counter[str] = Counter()
        self.moments = 0
        # What a FastCall uses of its application.
        self.message_bytes, self.tracer, self.access = 1 << 20, None, None
        self.errors: list[BaseException] = []
        self.deadlines = Deadlines(self.clock)

    def on_moment(self) -> None:
        self.moments += 1
        if action := self.actions.pop(self.moments, None):
            action()

    async def start(self, stack: AsyncExitStack) -> None:
        self._add("plain", self._batching("plain", Model, 0.002, Rules(), calls=12))
        self._add("ordered", self._batching("ordered", Model, 0.001, Rules(preserves_order=True)))
        self._add("quick", self._batching("quick", QuickModel, 0.00002, Rules(), instances=1))
        self._ensemble("rows", "ordered", then="plain")
        self._ensemble("quick rows", "quick", then="quick")
        self._ensemble("nested", "rows")
        self._add("sequence", self._sequencing())
        cached = self._add("cached", self._batching("cached", Model, 0.002, Rules()))
        keys = ResponseKeys("cached", 1, "digest", config_pb.ModelConfig(), SIGNATURE)
        store = ResponseStore(1 << 20)
        cached.response_cache = ResponseCache(
            keys, cached.scheduler, store, cached.statistics, ttl_s=0.001, clock=self.clock
        )
        self._decoupled()
        for version in self.versions.values():
            if (cache := version.response_cache) is not None:
                await version._resources.enter_async_context(version.scheduler)
                await version._resources.enter_async_context(cache)
            else:
                await version._resources.enter_async_context(version.decoupled or version.scheduler)

    def _add(self, name: str, scheduler: Any, completed: Completed | None = None) -> Version:
        version = self.versions[name] = Version(name, WantedVersion(1, "digest", open=lambda: None))
        version._loaded = Loaded(completed or Completed(config_pb.ModelConfig(name=name), SIGNATURE, False), None)
        version.state, version._scheduler, version.statistics = State.READY, scheduler, scheduler._statistics
        return version

    def _batching(
        self, name: str, kind: type[Model], seconds: float, rules: Rules, *, instances: int = 2, calls: int = 2048
    ) -> Scheduler:
        model = self.models[name] = kind(self.clock)
        return Scheduler(
            name,
            lambda: Execution(name, model, SIGNATURE, self.clock),
            BatchPolicy(3, 1 << 20),
            QueueLimits(calls=calls),
            rules,
            instances=instances,
            statistics=virtual_time.Statistics(),
            outcomes=self.outcomes,
            clock=self.clock,
            worker=lambda execution, loop, name: Worker(execution, loop, lambda rows: seconds * rows),
        )

    def _ensemble(self, name: str, by_row: str, then: str = "") -> None:
        steps = [step(by_row.replace(" ", "_"), {"x": "x"}, {"y": "a" if then else "y"})]
        if then:
            steps.append(step(then, {"x": "a"}, {"y": "y"}))
        more = "" if by_row == "rows" else parameter("each.0", "x")
        more += tensor("input", "x", "-1, 1", "FP64") + tensor("output", "y", "-1, 1", "FP64")
        text = written(*steps, more=f"max_batch_size: 0 {more}")
        config = model_config.parse(text)
        config.name = name
        graph = graphs.graph_of(config, says_batch=True)
        versions = [self.versions[model] for model in (by_row, then) if model]
        plan = flow.plan(graph, versions, {})
        scheduler = EnsembleScheduler(
            plan,
            lambda plan: plan,
            QueueLimits(calls=16),
            statistics=virtual_time.Statistics(),
            outcomes=self.outcomes,
            clock=self.clock,
        )
        self._add(name, scheduler, plan.completed)

    def _sequencing(self) -> SequenceScheduler:
        settings = simulated.settings(slots=2, rows=2, idle_s=0.05, preserves_order=True)
        log, poison = [], set()
        self.models["sequence"] = SimpleNamespace(poison=poison)
        signature = virtual_time.Signature((), (simulated.Y,), 2)
        return SequenceScheduler(
            "sequence",
            lambda n: SequenceExecution(
                "sequence",
                simulated.Model(n, log, poison, self.clock),
                signature,
                settings,
                simulated.FIRST,
                self.clock,
            ),
            settings,
            QueueLimits(calls=16),
            instances=2,
            first_shapes=((1, 1),),
            statistics=virtual_time.Statistics(),
            outcomes=self.outcomes,
            clock=self.clock,
            worker=lambda execution, loop, name: Worker(execution, loop, lambda rows: 0.002),
        )

    def _decoupled(self) -> None:
        self.streams = [Stream(), Stream()]
        session: Any = SimpleNamespace(
            streams=lambda: self.streams,
            limits=SimpleNamespace(streams=1, execution_s=math.inf),
            poison=SimpleNamespace(
                rejected_for_s=lambda request: 0.0,
                record_crash=lambda requests, **more: None,
                record_success=lambda requests: None,
            ),
            check_running=lambda: None,
            datatypes={"x": "FP64"},
            wants_requests=False,
            textual=lambda array: array,
        )
        scheduler = DecoupledScheduler(
            "decoupled", 1, session, QueueLimits(calls=4), statistics=virtual_time.Statistics(), clock=self.clock
        )
        version = self._add("decoupled", scheduler)
        version._scheduler, version.decoupled = None, scheduler

    # Calls

    def call(self, number: int, target: str, *, rows: int, timeout_ms: int, is_fast: bool) -> None:
        """A client makes a call; its input begins with `value(number)`."""
        client = self.clients[number] = Client(self, number, timeout_ms)
        handler = partial(self._handle, number, target, rows, is_fast and target in FAST)
        call = self.calls[number] = RecordedCall(self, handler, client)
        call.data(b"\0\0\0\0\0", 5, is_end=True)

    def half_call(self, number: int, *, timeout_ms: int) -> FastCall:
        """A client makes a call, of which only the beginning arrives."""
        client = self.clients[number] = Client(self, number, timeout_ms)
        call = self.calls[number] = RecordedCall(self, lambda body, call: None, client)
        call.data(b"\0\0", 2, is_end=False)
        return call

    def bulk(self, numbers: Sequence[int], targets: Sequence[str], *, timeout_ms: int) -> None:
        """A client makes a bulk of calls."""
        entries = [
            bulk_pb2.InferBulkRequest.Entry(number=number, timeout_ms=timeout_ms if number % 2 else 0)
            for number in numbers
        ]
        for number in numbers:
            self.entries[number] = RecordedEntry(number)
        by_number = dict(zip(numbers, targets, strict=True))

        def infer(body: bytes, entry: Entry) -> None:
            self._handle(entry._number, by_number[entry._number], 1, True, body, entry)

        async def requests() -> AsyncIterator[Any]:
            yield bulk_pb2.InferBulkRequest(entries=entries)
            while True:
                number = await self.given_up.get()
                yield bulk_pb2.InferBulkRequest(given_up=[number])

        async def read() -> None:
            async with aclosing(Bulk(infer, "i", self.clock).responses(requests())) as responses:
                async for response in responses:
                    for outcome in response.answers:
                        self.entries[outcome.number].responses.append(outcome.code or outcome.response)
                    self.on_moment()

        self._task(read())

    def _task(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        return task

    def _handle(self, number: int, target: str, rows: int, is_fast: bool, body: bytes, exchange: Any) -> None:
        request = request_of(number, target, rows)
        version = self.versions[target]
        if is_fast:
            self.begun[target] += 1
            template = Template((), request.outputs, rows, request.size_bytes, request.key)
            _FastRequest(exchange, version, b"", template, b"").start(request, "")
            return
        task = self._task(self._run(version, request, exchange))
        exchange.on_end = task.cancel

    async def _run(self, version: Version, request: InferenceRequest, exchange: Any) -> None:
        try:
            with version:
                began = self.clock()
                self.begun[version.name] += 1
                try:
                    outputs = await self._outputs(version, request, exchange.deadline)
                except (Exception, asyncio.CancelledError):
                    # As in `InferenceServer.infer`.
                    version.statistics.failed(int((self.clock() - began) * 1e9))
                    raise
            response = pb.ModelInferResponse(raw_output_contents=[output.tobytes() for output in outputs])
            data = response.SerializeToString()
            exchange.reply((data,), len(data))
        except asyncio.CancelledError:
            assert exchange.is_over
        except Exception as err:
            exchange.refuse(err)

    async def _outputs(self, version: Version, request: InferenceRequest, deadline: float) -> Sequence[Any]:
        if version.decoupled is not None:
            found: list[Any] = []
            async with aclosing(version.decoupled.stream(request, deadline)) as responses:
                async for response in responses:
                    if response.error is not None:
                        raise response.error
                    found += response.outputs
            return found
        if version.response_cache is not None:
            result, _ = await version.response_cache.result(request, {}, deadline)
            return result.outputs
        return (await version.scheduler.submit(request, deadline)).outputs

    # Interference

    def disconnect(self, numbers: Sequence[int]) -> None:
        """The connection of these calls is lost."""
        for number in numbers:
            call, client = self.calls.get(number), self.clients.get(number)
            if call is not None and client is not None and not call.is_over:
                client.is_cancelled = True
                call.disconnected()

    def expire(self, numbers: Sequence[int]) -> None:
        """The deadlines of these calls pass, and the next check ends them together."""
        for number in numbers:
            call = self.calls.get(number)
            if call is not None and call.deadline != math.inf and not call.is_over:
                self.clients[number].is_expired = True
                call.deadline = self.clock()
        self.deadlines._check()

    def give_up(self, number: int) -> None:
        """The client of a bulk cancels one entry."""
        entry = self.entries.get(number)
        if entry is not None and not entry.responses:
            entry.is_given_up = True
            self.given_up.put_nowait(number)


def value(number: int) -> float:
    """The first number of a call's input; no output of a model is such a number."""
    return number * 1000 + 0.5


def request_of(number: int, target: str, rows: int) -> InferenceRequest:
    if target == "sequence":
        # Three calls are the steps of a sequence.
        is_first, is_last = number % 3 == 0, number % 3 == 2
        return simulated.step(number // 3 + 1, value(number), start=is_first, end=is_last)
    if target == "cached":
        number, rows = number % 2, 1
    x = np.array([value(number) + n / 1000 for n in range(rows)])[:, None]
    return InferenceRequest({"x": x}, (WantedOutput(Y),), rows, x.nbytes, "k", Parameters(0, 0))


def is_own(number: int, target: str, rows: int, outputs: Sequence[Any]) -> bool:
    """Return True for the outputs that belong to a call."""
    x = request_of(number, target, rows).inputs["x"]
    if target == "sequence":
        # The sum of this step and the ones before it that succeeded.
        before = [value(n) for n in range(number - number % 3, number)]
        sums = {sum((v for n, v in enumerate(before) if mask >> n & 1), value(number)) for mask in range(4)}
        return float(outputs[0][0]) in sums
    if target == "decoupled":
        return np.array_equal(outputs[0], 2 * x[:, 0] + 1) and np.array_equal(outputs[1], 2 * x[:, 0] + 2)
    y = 2 * x[:, 0] + 1
    return np.allclose(outputs[0], 2 * y + 1 if target in ("rows", "quick rows", "nested") else y)


def outputs_of(response: bytes, *, prefix: int = 5) -> list[Any]:
    message = pb.ModelInferResponse.FromString(response[prefix:])
    return [np.frombuffer(raw, np.float64) for raw in message.raw_output_contents]


def run(main: Callable[[SteppedLoop], Any]) -> Any:
    """Run `main(loop)` in simulated time."""
    loop = SteppedLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.on_step = lambda: None
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class Errors(logging.Handler):
    """Collects the log records of errors: nothing that clients do is one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))
