"""Session of a model in model processes: one process for each instance, each running one batch at a time.

batch ──> a free process ──"run"──> ──"result"──> arrays          ModelDied when the process dies meanwhile
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
from services.infer.model_process.inner_calls import ModelRun, OuterCall, Reply, error_reply
from services.infer.model_process.instance import Instance, Runner
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.poison import PoisonTable
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import BY_CODE, Code, FailedPrecondition, Internal, ShoalError
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NAME

log = logging.getLogger(__name__)

# Interval at which a running batch is checked for callers that still wait.
_POLL_S = 0.05
# The process is killed when no caller has waited for its run for so long: the run may never end.
_ABANDONED_S = 30.0
# A process that has closed its channel is killed when it has not exited after this.
_REAPED_S = 5.0
# Longest wait for a free instance.
_FREE_S = 60.0
# Longest wait of `run` for a process that is restarting.
_RESTARTED_S = 30.0
# An error becomes a status message, which travels in a header of limited size.
_MAX_ERROR_CHARACTERS = 1000
# Retries of a batch on the next process, when a process died before it had read the batch.
_UNREAD_TRIES = 3


class ModelDied(ModelFailed):
    """The model's process ended while it ran a batch."""

    def __init__(self, message: str, *, is_confirmed: bool, is_unread: bool = False, is_alone: bool = True) -> None:
        """Store the circumstances.

        Args:
            is_confirmed: the process crashed by itself; it was not killed from outside.
            is_unread: the process had not read the batch yet.
            is_alone: the process executed no batch of another user at the same time.
        """
        super().__init__(message)
        self.is_confirmed, self.is_unread, self.is_alone = is_confirmed, is_unread, is_alone


@dataclass(frozen=True)
class Limits:
    """Time and concurrency limits of one model."""

    execution_s: float = math.inf
    """A process whose run takes longer is killed."""
    load_s: float = 600.0
    """The same for loading."""
    streams: int = 64
    """Concurrent requests of one instance of a decoupled model."""


RunInnerCall = Callable[[Message, ModelRun, Reply], None]
"""Runs an inner call (of another model) of a run; passes the response to the function, later and from any thread."""


class ProcessSession(Session):
    """One model in one or several model processes. Any thread may run it."""

    reshapes = True

    def __init__(
        self,
        name: str,
        title: str,
        instances: Sequence[Instance],
        limits: Limits,
        call: RunInnerCall | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_given_up: Callable[[], bool] = bool,
    ) -> None:
        """Start the instances and wait until all are loaded. The session owns the instances.

        Args:
            name: the model's name, for callers.
            title: the model's name in the log.
            call: runs the calls that the model makes of other models; None: such calls are rejected.
            is_given_up: loading ends early when this returns True.

        Raises:
            FailedPrecondition: an instance could not be loaded.
        """
        self.name, self.title, self.limits, self._call = name, title, limits, call
        self._is_given_up = is_given_up
        self.instances = instances
        self._streams: dict[Instance, DecoupledStreams] = {}
        self._numbers = itertools.count(1)
        self.on_streams_started: Callable[[], None] = lambda: None
        """Called on a supervisor thread when an instance of a decoupled model has started or restarted."""
        for instance in instances:
            instance.on_running = partial(self._start_streams, instance)
        try:
            for instance in instances:
                instance.start()
            model_info = [instance.wait_loaded(is_given_up) for instance in instances]
            self.model_info = model_info[0]
            self.inputs, self.outputs = _specs(self.model_info, "inputs"), _specs(self.model_info, "outputs")
            self.optional_inputs = _specs(self.model_info, "optional_inputs", is_optional=True)
        except BaseException:
            self.close()
            raise
        self.text = bool(self.model_info.get("text"))
        self.wants_requests = bool(self.model_info.get("wants_requests"))
        self.handles_missing_inputs = bool(self.model_info.get("handles_missing_inputs"))
        self.is_decoupled = bool(self.model_info.get("is_decoupled"))
        self.allows_trial_run = bool(self.model_info.get("allows_trial_run"))
        self.poison = PoisonTable(clock)
        self.sets_max_batch_size = bool(self.model_info.get("sets_max_batch_size"))
        self.gpus = tuple(sorted({gpu for each in model_info for gpu in each.get("gpus", ())}))
        self.datatypes = {spec.name: spec.datatype.name for spec in (*self.inputs, *self.optional_inputs)}
        self._free: queue.LifoQueue[Instance] = queue.LifoQueue()
        for instance in instances:
            self._free.put(instance)

    def completed(self, config: pb.ModelConfig, *, sets_max_batch_size: bool) -> pb.ModelConfig:
        """Return the configuration as completed by the model; `config` when the model completes nothing.

        Raises:
            FailedPrecondition: the completed configuration is invalid.
        """
        completed_json = self.model_info.get("config")
        if completed_json is None:
            return config
        completed = from_json(completed_json)
        completed.name = config.name
        return completed

    def _start_streams(self, instance: Instance, process: Runner) -> None:
        if process.model_info.get("is_decoupled"):
            self._streams[instance] = DecoupledStreams(process, self._call_from_stream)
            self.on_streams_started()

    def streams(self) -> list[DecoupledStreams]:
        """Return the streams of each running instance of a decoupled model."""
        return [each for each in list(self._streams.values()) if not each.is_over and not each.process.died.is_set()]

    def check_running(self) -> None:
        """Raise Unavailable, with `retry_after_ms`, when no instance is running."""
        if not any(instance.is_running() for instance in self.instances):
            self.instances[0].running()

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        rows = [len(next(iter(inputs.values())))] if self._has_rows(inputs) else []
        details: list[dict[str, Any]] = [{}] if self.wants_requests else []
        arrays = {name: [array] for name, array in inputs.items()}
        results = self.run_requests(
            arrays, outputs, rows, details, is_wanted=lambda: not self._is_given_up(), patience_s=_RESTARTED_S
        )
        result = (
            results[0] if len(results) == 1 else ModelFailed(f"the model sent {len(results)} results for one request")
        )
        if isinstance(result, Exception):
            raise ModelFailed(result.message if isinstance(result, ShoalError) else str(result)) from result
        return result

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
        on: Runner | None = None,
        most_rows: int = 0,
        outer: Callable[[], OuterCall] = OuterCall,
        on_waited: Callable[[int], None] = lambda waited_ns: None,
    ) -> list[list[Tensor] | Exception]:
        """Run the requests of one batch.

        Args:
            inputs: for each input, the array of each request.
            rows: number of rows of each request; empty for one request without a batch dimension.
            details: metadata of each request (`request_info`), for a model that `wants_requests`.
            is_wanted: returns True while a caller waits for the result.
            patience_s: longest wait for a process that is restarting.
            on: the process that must run the batch, without retries elsewhere; None: a free process.
            most_rows: largest batch after a shared process has stacked rows of other infer processes; 0: no stacking.
            outer: returns what the inner calls of the run inherit; called for each of them, while the batch runs.
            on_waited: called with the nanoseconds that the batch waited inside a shared process.

        Returns:
            One result for each request, when the model returns them request by request; else one result with all rows.

        Raises:
            ModelFailed: the model cannot process the batch.
            ModelDied: the model's process ended.
            Unavailable: no process is running.
        """
        parts = [payload.part(name, self.datatypes[name], arrays) for name, arrays in inputs.items()]
        header = {"op": "run", "id": next(self._numbers), "outputs": list(outputs), "rows": list(rows)}
        if self.wants_requests:
            header["details"] = list(details)
        elif most_rows:
            header["most"] = most_rows
        if on is not None:
            return self._results(self._exchange_on(on, header, parts, is_wanted, outer), outputs)
        with self._free_instance() as instance:
            for is_last in (*(False,) * _UNREAD_TRIES, True):
                process = instance.running(patience_s)
                with process.using:
                    response = (
                        self._exchange(process, header, parts, is_wanted, outer, is_last)
                        if _is_alive(process)
                        else None
                    )
                if response is not None:
                    on_waited(int(response.header.get("waited_ns", 0)))
                    return self._results(response, outputs)
        raise ModelDied("the model's process dies right after each start", is_confirmed=False)

    @contextmanager
    def _free_instance(self) -> Iterator[Instance]:
        """Reserve a free instance for the block; one with a running process is preferred."""
        reserved: list[Instance] = []
        try:
            reserved.append(self._free.get(timeout=_FREE_S))
            while not reserved[-1].is_running() and len(reserved) < len(self.instances):
                reserved.append(self._free.get_nowait())
        except queue.Empty:
            if not reserved:
                raise Internal(f"no process of model {self.title} was free for {_FREE_S:.0f} s") from None
        chosen = next((each for each in reserved if each.is_running()), reserved[-1])
        for each in reserved:
            if each is not chosen:
                self._free.put(each)
        try:
            yield chosen
        finally:
            self._free.put(chosen)

    def _exchange_on(
        self,
        process: Runner,
        header: dict[str, Any],
        parts: Sequence[TensorPart],
        is_wanted: Callable[[], bool],
        outer: Callable[[], OuterCall],
    ) -> Message:
        with process.using:
            response = self._exchange(process, header, parts, is_wanted, outer, False) if _is_alive(process) else None
        if response is None:
            raise ModelDied(f"the model's process died ({process.end})", is_confirmed=False, is_unread=True)
        return response

    def declare(self, datatypes: Mapping[str, str]) -> None:
        """Add inputs, with their datatypes, that the server fills in and the model has not declared."""
        self.datatypes = {**datatypes, **self.datatypes}

    def _exchange(
        self,
        process: Runner,
        header: dict[str, Any],
        parts: Sequence[TensorPart],
        is_wanted: Callable[[], bool],
        outer: Callable[[], OuterCall],
        is_last: bool,
    ) -> Message | None:
        """Send the batch and return the response.

        Returns None when the process died before it had read the batch, unless this is the last try.
        """
        run = ModelRun(self, outer)
        exchange = _Exchange(self, process, header["id"], is_wanted, run)
        try:
            process.channel.send(header, parts)
            return exchange.receive()
        except ChannelClosed as err:
            _wait_reaped(process, err)
            is_unread = err.is_unread or not process.has_started()
            if is_unread and not exchange.has_sent_more and not is_last:
                return None
            text = f"the model's process died ({process.end})"
            raise ModelDied(text, is_confirmed=process.is_own_crash(), is_alone=process.is_alone()) from err
        finally:
            run.end()

    def rejection(self, name: str, after_s: float) -> Internal:
        """Return the error for a poison request."""
        return Internal(
            f"Failed to process the request(s) for model '{name}': this request has crashed the model's process "
            f"before; it is rejected for {after_s:.0f} s"
        )

    def call_other(self, process: Runner, message: Message, run: ModelRun | None) -> None:
        """Run a call that the model makes of another model during `run`, and send the response to `process`.

        A call without a run is rejected: its request has ended.
        """

        def send(header: dict[str, Any], parts: Sequence[TensorPart]) -> None:
            try:
                process.channel.send(header, parts)
            except (ChannelClosed, OSError) as err:
                log.info(
                    "model %(model_process)s: the response to its inner call could not be sent: %(error)s",
                    {"event": "model.inner_response_not_sent", "model_process": self.title, "error": err},
                )

        self._run_inner_call(message, run, send)

    def _call_from_stream(self, message: Message, run: ModelRun | None, streams: DecoupledStreams) -> None:
        self._run_inner_call(message, run, streams.reply)

    def _run_inner_call(self, message: Message, run: ModelRun | None, send: Reply) -> None:
        number = message.header.get("id")

        def reply(header: dict[str, Any], parts: Sequence[TensorPart]) -> None:
            send({**header, "op": "answer", "id": number}, parts)

        if self._call is None:
            reply(*error_reply("calls to other models are not supported here", Code.UNIMPLEMENTED))
        elif run is None:
            reply(*error_reply("other models can be called only while a request is executed", Code.CANCELLED))
        else:
            self._call(message, run, reply)

    def _results(self, response: Message, outputs: Sequence[str]) -> list[list[Tensor] | Exception]:
        if response.op == "error":
            raise ModelFailed(str(response.header.get("error"))[:_MAX_ERROR_CHARACTERS])
        try:
            return self._split(response, outputs)
        # A model process is not trusted: its header may have any content.
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ModelFailed("the model process sent an invalid response") from err

    def _split(self, response: Message, outputs: Sequence[str]) -> list[list[Tensor] | Exception]:
        arrays = iter([self.textual(array) for _, _, array in response.tensors])
        responses = response.header.get("responses")
        if responses is None:
            return [[_next(arrays) for _ in outputs]]
        return [
            error_of(entry, self.name) if "error" in entry else [_next(arrays) for _ in range(entry.get("outputs", 0))]
            for entry in responses
        ]

    def textual(self, array: Tensor) -> Tensor:
        """Return `array` with its BYTES elements as `str`, if this session's elements are text."""
        if not self.text or array.dtype != object:
            return array
        text: Tensor = np.empty(array.size, object)
        text[:] = [element.decode(errors="replace") for element in array.reshape(-1)]
        return text.reshape(array.shape)

    def close(self) -> None:
        # In parallel: the clean-up code of each may take a while.
        with ThreadPoolExecutor(len(self.instances)) as threads:
            list(threads.map(Instance.close, self.instances))


class _Exchange:
    """One run in a process: waits for the response, kills a process that exceeds its limits."""

    def __init__(
        self,
        session: ProcessSession,
        process: Runner,
        number: int,
        is_wanted: Callable[[], bool],
        run: ModelRun,
    ) -> None:
        self._session, self._process, self._run = session, process, run
        self._number, self._is_wanted = number, is_wanted
        self.has_sent_more = False
        """True once the process was sent anything after the request."""
        self._is_cancel_sent = False

    def receive(self) -> Message:
        """Wait for the response; run the model's inner calls meanwhile. Raises ChannelClosed."""
        start = last_wanted = time.monotonic()
        while True:
            message = self._process.channel.receive(_POLL_S)
            if message is not None:
                if message.op == "call":
                    self.has_sent_more = True
                    # A call without a number comes from a thread that the model has started.
                    is_own = message.header.get("for") in (None, self._number)
                    self._session.call_other(self._process, message, self._run if is_own else None)
                    continue
                if message.op not in ("result", "error") or message.header.get("id") != self._number:
                    self._process.kill("killed: it sent a response that does not match the request")
                    # An earlier request caused this: the current one may be retried as if it were unread.
                    raise ChannelClosed("the response does not match the request", is_unread=True)
                return message
            now = time.monotonic()
            last_wanted = now if self._is_wanted() else last_wanted
            self._check_time(self._process.running_s(start, now), now - last_wanted)

    def _check_time(self, running_s: float, abandoned_s: float) -> None:
        limit_s = self._session.limits.execution_s
        if running_s > limit_s:
            self._process.kill(f"killed: a run took longer than execution_timeout_ms, {limit_s * 1000:.0f}")
            raise ChannelClosed("the run took too long")
        if abandoned_s > _ABANDONED_S and running_s:
            self._process.kill(f"killed: the run did not end within {_ABANDONED_S:.0f} s after its last caller left")
            raise ChannelClosed("no caller waits")
        if abandoned_s and not self._is_cancel_sent:
            self._run.end()
            self.has_sent_more = self._is_cancel_sent = True
            self._process.channel.send({"op": "cancel", "id": self._number})


def _is_alive(process: Runner) -> bool:
    """Return True when the process lives. A death while the process was idle is detected here and blames no request."""
    if process.died.is_set():
        return False
    try:
        if process.channel.receive(0) is None:
            return True
    except ChannelClosed as err:
        _wait_reaped(process, err)
    else:
        _wait_reaped(process, ChannelClosed("it sent a message while it was idle"), within_s=0.0)
    return False


def _wait_reaped(process: Runner, error: ChannelClosed, within_s: float = _REAPED_S) -> None:
    """Wait for the end of a process whose channel failed; kill the process when it does not end by itself."""
    if not process.died.wait(within_s):
        process.kill(f"its channel failed: {error}")
        process.died.wait()


def _next(arrays: Iterator[Tensor]) -> Tensor:
    array = next(arrays, None)
    if array is None:
        raise ModelFailed("the model process sent fewer outputs than its header declares")
    return array


def error_of(response: Mapping[str, Any], model: str) -> ShoalError:
    """Return the error of one request.

    An error that the model itself returned keeps its text and status. All others are INTERNAL and name the model.
    """
    text = str(response["error"])[:_MAX_ERROR_CHARACTERS]
    if not response.get("own"):
        return Internal(f"Failed to process the request(s) for model '{model}': {text}")
    code = Code.__members__.get(str(response.get("code")), Code.INTERNAL)
    return BY_CODE.get(code, Internal)(text)


def _specs(model_info: Mapping[str, Any], role: str, *, is_optional: bool = False) -> tuple[TensorSpec, ...]:
    specs = []
    names = set()
    for name, datatype, shape in model_info.get(role, ()):
        if datatype not in BY_NAME:
            raise FailedPrecondition(f"{role.removesuffix('s')} '{name}' has an unknown datatype, {datatype}")
        if name in names:
            raise FailedPrecondition(f"{role.removesuffix('s')} '{name}' is declared twice")
        names.add(name)
        specs.append(TensorSpec(name, BY_NAME[datatype], tuple(int(dim) for dim in shape), is_optional=is_optional))
    return tuple(specs)
