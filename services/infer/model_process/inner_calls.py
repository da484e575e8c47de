"""Inner calls: calls that a model makes of another model of this server (Triton's "business logic scripting").

model process ──"call"──> session ──> event loop: core.infer ──> "answer" ──> model process

An inner call inherits deadline, tenant and priority from the requests in execution (its outer call), and ends with
them. A call that no instance would ever become free for is rejected at once (`Waits.cycle`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np

from mesh.h2.memory_account import MemoryAccount, Share
from mesh.rpc.call_context import RequestMemory
from mesh.rpc.framing import no_memory
from services.infer.model_process.channel import Message
from services.infer.model_process.payload import Tensor, TensorPart
from services.infer.model_process.request_info import SEQUENCE_END, SEQUENCE_START
from services.infer.requests.request import RunningRequest
from services.infer.requests.request_memory import UNCOUNTED, RequestPart
from shoal.errors import Code, DeadlineExceeded, FailedPrecondition, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import to_raw

log = logging.getLogger(__name__)

Reply = Callable[[dict[str, Any], Sequence[TensorPart]], None]

_Response: TypeAlias = tuple[dict[str, Any], Sequence[TensorPart]]
"""Arguments of a `Reply`."""

_MAX_ERROR_CHARACTERS = 1000
_FIELDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


class Core(Protocol):
    """The InferenceServer, as far as inner calls need it."""

    async def infer(
        self,
        message: pb.ModelInferRequest,
        deadline: float = ...,
        tenant: str = ...,
        *,
        inner_call: object = ...,
        memory: RequestMemory = ...,
        message_bytes: int = ...,
    ) -> pb.ModelInferResponse: ...

    def sessions(self, name: str, version: str) -> Sequence[object]:
        """Return the sessions that every request to a model needs; empty for an unknown model."""


@dataclass(frozen=True, eq=False)
class InnerCall:
    """One call that a model makes of another one. Compared by identity."""

    sessions: Sequence[object]
    """The sessions that execute it."""


@dataclass(frozen=True)
class OuterCall:
    """Values that inner calls inherit from the requests in execution."""

    deadline: float = math.inf
    """On the server's clock."""
    tenant: str = ""
    priority: int = 0
    """0: the called model's default."""
    inner_calls: frozenset[object] = frozenset()
    """The calls of other models that the requests belong to."""


def outer_of(batch: Sequence[RunningRequest]) -> OuterCall:
    """Return the values for a batch: the latest deadline; tenant and priority of the first request that waits."""
    waiting = [item for item in batch if not item.is_abandoned] or batch
    first = waiting[0]
    return OuterCall(
        max(item.deadline for item in waiting),
        first.tenant,
        first.request.parameters.priority,
        frozenset(item.request.parameters.inner_call for item in batch),
    )


class CallingModel(Protocol):
    """A model that makes calls: a `session.ProcessSession`. Compared by identity."""

    name: str

    @property
    def instances(self) -> Sequence[object]: ...


class ModelRun:
    """One run of a model in its process, or one request of a decoupled model. Any thread may use it."""

    __slots__ = ("_on_end", "executes", "is_over", "model", "outer")

    def __init__(self, model: CallingModel, outer: Callable[[], OuterCall]) -> None:
        """Store the model, and the function that returns the values that its inner calls inherit."""
        self.model = model
        self.outer = outer
        self.executes: frozenset[object] = frozenset()
        """Inner calls that the run executes, once it has made one itself. Only the event loop's thread uses it."""
        self.is_over = False
        self._on_end: Callable[[], None] | None = None

    def end(self) -> None:
        """End the inner calls of the run; later ones are rejected."""
        self.is_over = True
        if self._on_end is not None:
            self._on_end()

    def watch(self, on_end: Callable[[], None]) -> bool:
        """Set the function that `end` calls. Return False when the run is over, and the function may not be called."""
        self._on_end = on_end
        # Read last: another thread's `end` either finds the function, or is found here.
        return not self.is_over


def error_reply(text: str, code: Code) -> _Response:
    """Return the arguments of a `Reply` with an error."""
    return {"error": text[:_MAX_ERROR_CHARACTERS], "code": code.name}, ()


# Memory of a call beside its tensors.
_CALL_BYTES = 8 << 10

# Shares of tenants that hold nothing are dropped beyond this number.
_MAX_IDLE_SHARES = 64


class _TenantMemory:
    """Memory of the inner calls of one tenant: a share of the account of requests."""

    def __init__(self, share: Share) -> None:
        self._share = share

    @property
    def held(self) -> int:
        return self._share.held

    @property
    def sender(self) -> Share:
        return self._share

    @property
    def room(self) -> int:
        """Bytes that `hold_response` may count now."""
        return self._share.free

    def hold(self, size: int) -> None:
        if not self._share.has_room(size):
            raise no_memory()
        self._share.add(size)

    def hold_response(self, size: int) -> None:
        if not self._share.fits(size):
            raise no_memory()
        self._share.add(size)

    def release(self, size: int) -> None:
        self._share.remove(size)


MOST_SEARCHED = 1_000
"""Runs, calls and their dependencies that one search for a cycle looks at, in about a millisecond of the event loop. A
call in a larger cycle is not rejected, and ends at its deadline."""


@dataclass(eq=False)
class _Group:
    """Runs that a call waits for while at least `most` of them are stuck."""

    runs: Collection[ModelRun]
    most: int
    stuck: int = 0
    calls: list[InnerCall] = field(default_factory=list)
    """Calls that wait for the group."""


class Waits:
    """Runs of models, and the inner calls that they wait for. Only the event loop's thread uses it.

    A run waits for all of its calls. A call waits for the runs that execute it; before them, for an instance.
    """

    def __init__(self) -> None:
        self._calls: dict[ModelRun, dict[InnerCall, None]] = {}
        """Calls of each run that have no response yet, in their order."""
        self._executors: dict[object, dict[ModelRun, None]] = {}
        """Waiting runs that execute a call."""
        self._holders: dict[object, dict[ModelRun, None]] = {}
        """Waiting runs of a model."""

    def set_executes(self, run: ModelRun, inner_calls: frozenset[object]) -> None:
        """Set the inner calls that `run` executes."""
        if run in self._calls and inner_calls != run.executes:
            self._unlink(run)
            run.executes = inner_calls
            self._link(run)
        else:
            run.executes = inner_calls

    def add(self, run: ModelRun, call: InnerCall) -> None:
        """Count `run` as waiting for `call`."""
        if run not in self._calls:
            self._calls[run] = {}
            self._link(run)
        self._calls[run][call] = None

    def remove(self, run: ModelRun, call: InnerCall) -> None:
        """Count `run` no longer as waiting for `call`."""
        calls = self._calls[run]
        del calls[call]
        if not calls:
            del self._calls[run]
            self._unlink(run)

    def _link(self, run: ModelRun) -> None:
        self._holders.setdefault(run.model, {})[run] = None
        for executed in run.executes:
            self._executors.setdefault(executed, {})[run] = None

    def _unlink(self, run: ModelRun) -> None:
        links = [(self._holders, run.model), *((self._executors, executed) for executed in run.executes)]
        for table, key in links:
            del table[key][run]
            if not table[key]:
                del table[key]

    def cycle(self, run: ModelRun, call: InnerCall) -> list[str]:
        """Return the names of the models in the cycle that `run` would wait in for ever with `call`; or none."""
        return _Search(self._calls, self._groups_of).cycle(run, call)

    def _groups_of(self, call: InnerCall) -> Iterator[tuple[object, Collection[ModelRun], int]]:
        """Yield the key, runs and `most` of each group that the call waits for, if all its runs are stuck."""
        if executors := self._executors.get(call):
            yield call, executors.keys(), 1
            return
        for session in call.sessions:
            if holders := self._holders.get(session):
                instances = max(1, len(next(iter(holders)).model.instances))
                if len(holders) >= instances:
                    yield session, holders.keys(), instances


class _Search:
    """One search for a cycle, in the runs that a call waits for, directly or through others."""

    def __init__(
        self,
        calls: Mapping[ModelRun, Collection[InnerCall]],
        groups_of: Callable[[InnerCall], Iterable[tuple[object, Collection[ModelRun], int]]],
    ) -> None:
        self._calls = calls
        self._groups_of = groups_of
        self._groups: dict[object, _Group] = {}
        self._blocking: dict[InnerCall, list[_Group]] = {}
        """Groups of each call that was found."""
        self._containing: dict[ModelRun, list[_Group]] = {}
        """Groups of each run that was found. At first, all of these runs count as stuck."""
        self._left = MOST_SEARCHED

    def cycle(self, run: ModelRun, call: InnerCall) -> list[str]:
        if not self._find(call):
            return []
        self._free()
        path, next_run = [run], self._blocking_run(call)
        if next_run is None:
            return []
        while next_run not in path:
            path.append(next_run)
            next_run = next(filter(None, map(self._blocking_run, self._calls[next_run])))
        return [each.model.name for each in (*path, next_run)]

    def _find(self, call: InnerCall) -> bool:
        """Find all that `call` waits for. Return False when that is nothing, or too much to look at."""
        pending = [call]
        while pending:
            waiting = pending.pop()
            if waiting in self._blocking:
                continue
            groups = self._blocking[waiting] = []
            for key, runs, most in self._groups_of(waiting):
                self._left -= 1
                group = self._groups.get(key)
                if group is None:
                    self._left -= len(runs)
                    if self._left < 0:
                        return False
                    group = self._groups[key] = _Group(runs, most, len(runs))
                    for run in runs:
                        if run not in self._containing:
                            self._containing[run] = []
                            self._left -= len(self._calls[run])
                            pending += self._calls[run] if self._left >= 0 else ()
                        self._containing[run].append(group)
                group.calls.append(waiting)
                groups.append(group)
            if self._left < 0:
                return False
        return bool(self._blocking[call])

    def _free(self) -> None:
        """Take the runs out of their groups that wait for no stuck ones."""
        owners = {call: run for run in self._containing for call in self._calls[run]}
        groups = {call: len(blocking) for call, blocking in self._blocking.items()}
        blocked = {run: sum(groups[call] > 0 for call in self._calls[run]) for run in self._containing}
        free = [run for run, calls in blocked.items() if not calls]
        while free:
            run = free.pop()
            for group in self._containing[run]:
                group.stuck -= 1
                if group.stuck != group.most - 1:
                    continue
                for call in group.calls:
                    groups[call] -= 1
                    owner = owners.get(call)
                    if not groups[call] and owner is not None:
                        blocked[owner] -= 1
                        free += [owner] if not blocked[owner] else []
        self._stuck = {run for run, calls in blocked.items() if calls}

    def _blocking_run(self, call: InnerCall) -> ModelRun | None:
        """Return a stuck run that the call waits for; None when there is none."""
        for group in self._blocking[call]:
            if group.stuck >= group.most:
                return next(run for run in group.runs if run in self._stuck)
        return None


class InnerCalls:
    """A `session.RunInnerCall` that runs calls on a core; rejects calls until `bind`."""

    def __init__(self) -> None:
        self._core: Core | None = None
        self._account: MemoryAccount | None = None
        self._memories: dict[str, _TenantMemory] = {}
        self._tasks: dict[ModelRun, set[asyncio.Task[_Response]]] = {}
        # Only the event loop's thread uses both.
        self._waits = Waits()

    def bind(self, core: Core, account: MemoryAccount | None = None) -> None:
        """Run all later calls on `core`, in the running event loop, and count them in the account of requests."""
        self._core, self._loop, self._account = core, asyncio.get_running_loop(), account

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        """Return the bytes that inner calls hold, by tenant."""
        return [(tenant, memory.held) for tenant, memory in self._memories.items()]

    def _memory_of(self, tenant: str) -> RequestMemory:
        if self._account is None:
            return UNCOUNTED
        memory = self._memories.get(tenant)
        if memory is None:
            if len(self._memories) >= _MAX_IDLE_SHARES:
                self._memories = {name: memory for name, memory in self._memories.items() if memory.held}
            memory = self._memories[tenant] = _TenantMemory(self._account.share())
        return memory

    def __call__(self, message: Message, run: ModelRun, reply: Reply) -> None:
        """Start a call of `run`, from any thread; `reply` gets the response on another thread."""
        if self._core is None:
            reply(*error_reply("the server is not ready for calls of models", Code.UNAVAILABLE))
        else:
            self._on_loop(self._start, self._core, message, run, run.outer(), reply)

    def _on_loop(self, callback: Callable[..., None], *args: Any) -> None:
        # The loop is closed: the server is shutting down, and the model process with it.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _start(self, core: Core, message: Message, run: ModelRun, outer: OuterCall, reply: Reply) -> None:
        if not run.watch(partial(self._on_loop, self._end, run)):
            self._loop.run_in_executor(None, reply, *_ended())
            return
        memory = RequestPart(self._memory_of(outer.tenant), message.tensor_bytes)
        task = asyncio.create_task(self._outcome(core, message, run, outer, memory))
        self._tasks.setdefault(run, set()).add(task)
        task.add_done_callback(partial(self._reply, run, reply, memory))

    def _reply(self, run: ModelRun, reply: Reply, memory: RequestPart, task: asyncio.Task[_Response]) -> None:
        """Send the response of a call, whose task has ended; the model waits for it even when the run has ended."""
        self._tasks[run].discard(task)
        if not self._tasks[run]:
            del self._tasks[run]
        # A task that is cancelled before its first step has no result.
        header, parts = _ended() if task.cancelled() else task.result()
        # On a thread: the model process may be slow to read.
        sent = self._loop.run_in_executor(None, reply, header, parts)
        sent.add_done_callback(lambda _: memory.close())

    def _end(self, run: ModelRun) -> None:
        for task in self._tasks.get(run, ()):
            task.cancel()

    async def _outcome(
        self, core: Core, message: Message, run: ModelRun, outer: OuterCall, memory: RequestPart
    ) -> _Response:
        parts: Sequence[TensorPart] = ()
        header: dict[str, Any] = {}
        try:
            # The tensors, and their copy in the request.
            memory.hold(_CALL_BYTES + 2 * memory.message_bytes)
            response = await self._infer(core, message, run, outer, memory)
            parts = [
                _part(output, raw) for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            ]
        except asyncio.CancelledError:
            header, _ = _ended()
        except ShoalError as err:
            header, _ = error_reply(err.message, err.code)
        except (TypeError, ValueError, KeyError) as err:
            header, _ = error_reply(f"the request cannot be read: {err}", Code.INVALID_ARGUMENT)
        except Exception:
            log.exception("unexpected error in a call that a model made", {"event": "model.inner_call_failed"})
            header, _ = error_reply("internal error: the log of the service has the cause", Code.INTERNAL)
        return header, parts

    async def _infer(
        self, core: Core, message: Message, run: ModelRun, outer: OuterCall, memory: RequestPart
    ) -> pb.ModelInferResponse:
        request = _request(message, outer.priority)
        now, timeout_us = time.monotonic(), message.header.get("timeout_us") or 0
        deadline = min(outer.deadline, now + timeout_us / 1e6) if timeout_us else outer.deadline
        self._waits.set_executes(run, outer.inner_calls)
        call = InnerCall(core.sessions(request.model_name, request.model_version))
        with self._waiting(run, call):
            try:
                async with asyncio.timeout(deadline - now if deadline != math.inf else None):
                    return await core.infer(
                        request,
                        deadline,
                        outer.tenant,
                        inner_call=call,
                        memory=memory,
                        message_bytes=memory.message_bytes,
                    )
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the deadline of the call of model '{request.model_name}' has passed: that of the caller of model "
                    f"'{run.model.name}', or the timeout of the call"
                ) from None

    @contextmanager
    def _waiting(self, run: ModelRun, call: InnerCall) -> Iterator[None]:
        """Count `run` as waiting for `call` in the block. Raises FailedPrecondition when it would wait for ever."""
        self._waits.add(run, call)
        try:
            if cycle := self._waits.cycle(run, call):
                raise FailedPrecondition(
                    f"model '{cycle[0]}' cannot call model '{cycle[1]}' now: {' -> '.join(cycle)} is a cycle, in which "
                    "all instances wait for such calls; set more instances (instance_group count)"
                )
            yield
        finally:
            self._waits.remove(run, call)


def _ended() -> _Response:
    return error_reply("the request that this call was made for has ended", Code.CANCELLED)


def _request(message: Message, priority: int) -> pb.ModelInferRequest:
    """Return the request of a call. Its priority is `priority`, unless the calling model has set one."""
    header = message.header
    request = pb.ModelInferRequest(model_name=header["model"], model_version=header["version"], id=header["request_id"])
    for name, value in header["parameters"].items():
        setattr(request.parameters[name], _FIELDS[type(value)], value)
    if priority and "priority" not in request.parameters:
        request.parameters["priority"].uint64_param = priority
    if header.get("sequence_id"):
        _set_sequence(request, header["sequence_id"], int(header["flags"]))
    for name, datatype, array in message.tensors:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(to_raw(array, BY_NAME[datatype]))
    for name in header["outputs"]:
        request.outputs.add(name=name)
    return request


def _set_sequence(request: pb.ModelInferRequest, id: int | str, flags: int) -> None:
    if isinstance(id, str):
        request.parameters["sequence_id"].string_param = id
    else:
        request.parameters["sequence_id"].uint64_param = id
    request.parameters["sequence_start"].bool_param = bool(flags & SEQUENCE_START)
    request.parameters["sequence_end"].bool_param = bool(flags & SEQUENCE_END)


def _part(output: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> TensorPart:
    # BYTES, too, have the layout of the wire here.
    array: Tensor = np.frombuffer(raw, np.uint8)
    return TensorPart(output.name, output.datatype, tuple(output.shape), (array,), len(raw))
