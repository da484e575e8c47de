"""A model in processes of its own, as a `Session`: one process for each instance, each running one batch at a time.

calls ──> a process that is free ──"run"──> ──"result"──> arrays          a death on the way: ModelDied
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from services.infer.model_files.config_json import from_json
from services.infer.model_process import payload
from services.infer.model_process.channel import ChannelClosed, Message
from services.infer.model_process.decoupled_streams import DecoupledStreams
from services.infer.model_process.instance import Instance, Running
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.poison import Poison
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import BY_CODE, Code, FailedPrecondition, Internal, ShoalError
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NAME

log = logging.getLogger(__name__)

_LOOK_S = 0.05
# While a model runs, how often it is asked whether anybody still waits for it.
_UNWANTED_S = 30.0
# A run that nobody has waited for since then is given up, and its process with it: it may never end.
_REAPED_S = 5.0
_FREE_S = 60.0
_RESTARTED_S = 30.0
_TEXT = 1000
# Characters of an error: a status message travels in a header.
_UNREAD_TRIES = 3
# A request that a dying process has not read is taken to the next one, so often.


class ModelDied(ModelFailed):
    """Its process ended while it ran the batch. `is_sure`: nobody from outside ended it. `is_unread`: it had not read
    the batch yet."""

    def __init__(self, message: str, *, is_sure: bool, is_unread: bool = False, is_alone: bool = True) -> None:
        """`is_alone`: nobody else's work was executed by it."""
        super().__init__(message)
        self.is_sure, self.is_unread, self.is_alone = is_sure, is_unread, is_alone


@dataclass(frozen=True)
class Limits:
    """Of a model's runs."""

    execution_s: float = math.inf
    """A run that takes longer is ended, and its process with it."""
    load_s: float = 600.0
    """The same for loading."""
    streams: int = 64
    """Requests that one instance of a decoupled model works on at a time."""


InnerCall = Callable[[Message, Callable[[dict[str, Any], Sequence[TensorPart]], None]], None]
"""Runs a call that a model makes of another one; gives the answer to the function, later and from any thread."""


class ProcessSession(Session):
    """One model in one or several processes. Any thread may run it."""

    reshapes = True

    def __init__(
        self,
        name: str,
        title: str,
        instances: Sequence[Instance],
        limits: Limits,
        call: InnerCall | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_given_up: Callable[[], bool] = bool,
    ) -> None:
        """Owns the instances, which are started here. Loading ends early when `is_given_up`.

        Args:
            name: of the model, as callers know it; `title` is how the log calls it.
            call: runs the calls that it makes of other models.

        Raises:
            FailedPrecondition: one could not be loaded.
        """
        self.name, self.title, self.limits, self._call = name, title, limits, call
        self.instances = instances
        self._links: dict[Instance, DecoupledStreams] = {}
        self._numbers = itertools.count(1)
        self.on_link: Callable[[], None] = lambda: None
        """Called on a keeper's thread when an instance of a decoupled model is there (again)."""
        for instance in instances:
            instance.on_running = partial(self._began, instance)
        try:
            for instance in instances:
                instance.start()
            facts = [instance.wait_loaded(is_given_up) for instance in instances]
            self.facts = facts[0]
            self.inputs, self.outputs = _specs(self.facts, "inputs"), _specs(self.facts, "outputs")
            self.optional_inputs = _specs(self.facts, "optional_inputs", is_optional=True)
        except BaseException:
            self.close()
            raise
        self.text = bool(self.facts.get("text"))
        self.wants_requests = bool(self.facts.get("wants_requests"))
        self.sees_missing = bool(self.facts.get("sees_missing"))
        self.is_decoupled = bool(self.facts.get("is_decoupled"))
        self.is_tried = bool(self.facts.get("is_tried"))
        self.poison = Poison(clock)
        self.says_batch = bool(self.facts.get("says_batch"))
        self.gpus = tuple(sorted({gpu for each in facts for gpu in each.get("gpus", ())}))
        self.datatypes = {spec.name: spec.datatype.name for spec in (*self.inputs, *self.optional_inputs)}
        self._free: queue.LifoQueue[Instance] = queue.LifoQueue()
        for instance in instances:
            self._free.put(instance)

    def completed(self, config: pb.ModelConfig, *, says_batch: bool) -> pb.ModelConfig:
        """The configuration as the model itself completed it; `config` when it did not. Raises FailedPrecondition."""
        said = self.facts.get("config")
        if said is None:
            return config
        completed = from_json(said)
        completed.name = config.name
        return completed

    def _began(self, instance: Instance, process: Running) -> None:
        if process.facts.get("is_decoupled"):
            self._links[instance] = DecoupledStreams(process, self._call_from_stream)
            self.on_link()

    def links(self) -> list[DecoupledStreams]:
        """Of the instances of a decoupled model that run."""
        return [link for link in list(self._links.values()) if not link.is_over and not link.process.died.is_set()]

    def check_running(self) -> None:
        """Raises Unavailable when no instance runs; it says when to come back."""
        if not any(instance.is_running() for instance in self.instances):
            self.instances[0].running()

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        rows = [len(next(iter(inputs.values())))] if self._has_rows(inputs) else []
        details: list[dict[str, Any]] = [{}] if self.wants_requests else []
        given = {name: [array] for name, array in inputs.items()}
        results = self.run_requests(given, outputs, rows, details, patience_s=_RESTARTED_S)
        got = results[0] if len(results) == 1 else ModelFailed(f"{len(results)} answers for one request")
        if isinstance(got, Exception):
            raise ModelFailed(got.message if isinstance(got, ShoalError) else str(got)) from got
        return got

    def _has_rows(self, inputs: Mapping[str, Tensor]) -> bool:
        return all(array.ndim for array in inputs.values()) and all(spec.shape[:1] == (-1,) for spec in self.inputs)

    def run_requests(
        self,
        inputs: Mapping[str, Sequence[Tensor]],
        outputs: Sequence[str],
        rows: Sequence[int],
        details: Sequence[Mapping[str, Any]],
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        patience_s: float = 0.0,
        on: Running | None = None,
        most_rows: int = 0,
        on_waited: Callable[[int], None] = lambda waited_ns: None,
    ) -> list[list[Tensor] | Exception]:
        """Runs the requests of one batch.

        Args:
            inputs: for each input, the array of each request.
            rows: of each request; empty for one request without a batch dimension.
            details: what each says of itself, for a model that wants to know.
            is_wanted: whether anybody waits for the answer.
            patience_s: how long to wait for a process that is being started again.
            on: the process that must run it, whatever comes. Else it is one that is free.
            most_rows: so many may be executed together with those of others, where others use the process; 0: none.
            on_waited: told how long it waited there for others, in nanoseconds.

        Returns:
            One result for each request that the model answered one by one; else one for all of them, rows stacked.

        Raises:
            ModelFailed: the model cannot process the batch. ModelDied: its process ended.
            Unavailable: there is no process just now.
        """
        parts = [payload.part(name, self.datatypes[name], arrays) for name, arrays in inputs.items()]
        header = {"op": "run", "id": next(self._numbers), "outputs": list(outputs), "rows": list(rows)}
        if self.wants_requests:
            header["details"] = list(details)
        elif most_rows:
            header["most"] = most_rows
        if on is not None:
            return self._results(self._exchanged_on(on, header, parts, is_wanted), outputs)
        with self._instance() as instance:
            for is_last in (*(False,) * _UNREAD_TRIES, True):
                process = instance.running(patience_s)
                with process.using:
                    answer = self._exchanged(process, header, parts, is_wanted, is_last) if _is_there(process) else None
                if answer is not None:
                    on_waited(int(answer.header.get("waited_ns", 0)))
                    return self._results(answer, outputs)
        raise ModelDied("the model's process dies as soon as it is started", is_sure=False)

    @contextmanager
    def _instance(self) -> Iterator[Instance]:
        """One that is free, for the block; one that runs, if there is one."""
        taken: list[Instance] = []
        try:
            taken.append(self._free.get(timeout=_FREE_S))
            while not taken[-1].is_running() and len(taken) < len(self.instances):
                taken.append(self._free.get_nowait())
        except queue.Empty:
            if not taken:
                raise Internal(f"no process of model {self.title} was free for {_FREE_S:.0f} s") from None
        found = next((each for each in taken if each.is_running()), taken[-1])
        for each in taken:
            if each is not found:
                self._free.put(each)
        try:
            yield found
        finally:
            self._free.put(found)

    def _exchanged_on(
        self, process: Running, header: dict[str, Any], parts: Sequence[TensorPart], is_wanted: Callable[[], bool]
    ) -> Message:
        with process.using:
            answer = self._exchanged(process, header, parts, is_wanted, False) if _is_there(process) else None
        if answer is None:
            raise ModelDied(f"the model's process died ({process.end})", is_sure=False, is_unread=True)
        return answer

    def declare(self, datatypes: Mapping[str, str]) -> None:
        """Inputs, and their datatypes, that the server fills in and the model has not declared."""
        self.datatypes = {**datatypes, **self.datatypes}

    def _exchanged(
        self,
        process: Running,
        header: dict[str, Any],
        parts: Sequence[TensorPart],
        is_wanted: Callable[[], bool],
        is_last: bool,
    ) -> Message | None:
        """The answer; None when the process died before it had read the request, unless this is the last try."""
        exchange = _Exchange(self, process, header["id"], is_wanted)
        try:
            process.channel.send(header, parts)
            return exchange.answer()
        except ChannelClosed as err:
            _reaped(process, err)
            is_unread = err.is_unread or not process.has_begun()
            if is_unread and not exchange.has_said_more and not is_last:
                return None
            said = f"the model's process died ({process.end})"
            raise ModelDied(said, is_sure=process.is_own_doing(), is_alone=process.is_alone()) from err

    def refusal(self, name: str, after_s: float) -> Internal:
        """Why a call is not run that has ended a process of the model before."""
        return Internal(
            f"Failed to process the request(s) for model '{name}': this request has ended the model's process before; "
            f"it is refused for {after_s:.0f} s"
        )

    def call_other(self, process: Running, message: Message) -> None:
        def send(header: dict[str, Any], parts: Sequence[TensorPart]) -> None:
            try:
                process.channel.send(header, parts)
            except (ChannelClosed, OSError) as err:
                log.info("model %s: the answer to its own call is lost: %s", self.title, err)

        self._call_answered(message, send)

    def _call_from_stream(self, message: Message, link: DecoupledStreams) -> None:
        self._call_answered(message, link.reply)

    def _call_answered(self, message: Message, send: Callable[[dict[str, Any], Sequence[TensorPart]], None]) -> None:
        number = message.header.get("id")

        def reply(header: dict[str, Any], parts: Sequence[TensorPart]) -> None:
            send({**header, "op": "answer", "id": number}, parts)

        if self._call is None:
            reply({"error": "calls to other models are not supported here", "code": "UNIMPLEMENTED"}, ())
        else:
            self._call(message, reply)

    def _results(self, answer: Message, outputs: Sequence[str]) -> list[list[Tensor] | Exception]:
        if answer.op == "error":
            raise ModelFailed(str(answer.header.get("error"))[:_TEXT])
        try:
            return self._given(answer, outputs)
        except (AttributeError, KeyError, TypeError, ValueError) as err:  # It is not taken at its word.
            raise ModelFailed("the model process sent what is no answer") from err

    def _given(self, answer: Message, outputs: Sequence[str]) -> list[list[Tensor] | Exception]:
        arrays = iter([self.textual(array) for _, _, array in answer.tensors])
        responses = answer.header.get("responses")
        if responses is None:
            return [[_next(arrays) for _ in outputs]]
        return [
            error_of(said, self.name) if "error" in said else [_next(arrays) for _ in range(said.get("outputs", 0))]
            for said in responses
        ]

    def textual(self, array: Tensor) -> Tensor:
        """An array as this session gives it: BYTES as `str` when they are text."""
        if not self.text or array.dtype != object:
            return array
        text: Tensor = np.empty(array.size, object)
        text[:] = [element.decode(errors="replace") for element in array.reshape(-1)]
        return text.reshape(array.shape)

    def close(self) -> None:
        with ThreadPoolExecutor(len(self.instances)) as threads:  # Each may take a while for its good-bye.
            list(threads.map(Instance.close, self.instances))


class _Exchange:
    """One run in a process: waits for its answer, as long as that makes sense."""

    def __init__(self, session: ProcessSession, process: Running, number: int, is_wanted: Callable[[], bool]) -> None:
        self._session, self._process = session, process
        self._number, self._is_wanted = number, is_wanted
        self.has_said_more = False
        """The process was sent more than the request."""
        self._is_told = False

    def answer(self) -> Message:
        """Raises ChannelClosed."""
        start = wanted = time.monotonic()
        while True:
            message = self._process.channel.receive(_LOOK_S)
            if message is not None:
                if message.op == "call":
                    self.has_said_more = True
                    self._session.call_other(self._process, message)
                    continue
                if message.op not in ("result", "error") or message.header.get("id") != self._number:
                    self._process.kill("killed: it answered what was not asked")
                    # What it was asked before is no fault of the request that it is asked now.
                    raise ChannelClosed("it answers something else", is_unread=True)
                return message
            now = time.monotonic()
            wanted = now if self._is_wanted() else wanted
            self._check_time(self._process.runs_s(start, now), now - wanted)

    def _check_time(self, runs_s: float, is_unwanted_s: float) -> None:
        limit_s = self._session.limits.execution_s
        if runs_s > limit_s:
            self._process.kill(f"killed: a run took longer than execution_timeout_ms, {limit_s * 1000:.0f}")
            raise ChannelClosed("it takes too long")
        if is_unwanted_s > _UNWANTED_S and runs_s:
            self._process.kill(f"killed: it went on for {_UNWANTED_S:.0f} s after everybody had gone")
            raise ChannelClosed("nobody waits")
        if is_unwanted_s and not self._is_told:
            self.has_said_more = self._is_told = True
            self._process.channel.send({"op": "cancel", "id": self._number})


def _is_there(process: Running) -> bool:
    """Whether it lives: one that died while it was idle is nobody's fault."""
    if process.died.is_set():
        return False
    try:
        if process.channel.receive(0) is None:
            return True
    except ChannelClosed as err:
        _reaped(process, err)
    else:
        _reaped(process, ChannelClosed("it spoke out of turn"), within_s=0.0)
    return False


def _reaped(process: Running, error: ChannelClosed, within_s: float = _REAPED_S) -> None:
    """Waits for the end of a process whose channel is closed; it is killed if it does not come."""
    if not process.died.wait(within_s):
        process.kill(f"it broke off: {error}")
        process.died.wait()


def _next(arrays: Iterator[Tensor]) -> Tensor:
    array = next(arrays, None)
    if array is None:
        raise ModelFailed("the model process sent fewer outputs than it said")
    return array


def error_of(said: Mapping[str, Any], model: str) -> ShoalError:
    """The error that `model` gave for one request: its own words, with the status that it chose; or ours about it."""
    if not said.get("own"):
        return Internal(f"Failed to process the request(s) for model '{model}': {str(said['error'])[:_TEXT]}")
    code = Code.__members__.get(str(said.get("code")), Code.INTERNAL)
    return BY_CODE.get(code, Internal)(str(said["error"])[:_TEXT])


def _specs(facts: Mapping[str, Any], role: str, *, is_optional: bool = False) -> tuple[TensorSpec, ...]:
    specs = []
    names = set()
    for name, datatype, shape in facts.get(role, ()):
        if datatype not in BY_NAME:
            raise FailedPrecondition(f"{role.removesuffix('s')} '{name}' is of an unknown datatype, {datatype}")
        if name in names:
            raise FailedPrecondition(f"{role.removesuffix('s')} '{name}' is declared twice")
        names.add(name)
        specs.append(TensorSpec(name, BY_NAME[datatype], tuple(int(dim) for dim in shape), is_optional=is_optional))
    return tuple(specs)
