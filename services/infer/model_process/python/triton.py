"""Triton's interface of `model.py`, unchanged: `TritonPythonModel` with initialize, execute and finalize.

`execute` gets the requests of one batch, each with its own rows, and gives a response for each. A model may also answer
through a request's response sender; a decoupled one does so always, any number of times.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
import traceback
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

from services.infer.model_process.hosted import Batch, Given, HostedModelInfo, Load, LoadFailed, RunFailed, Sender
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.python.config_form import specs
from services.infer.model_process.python.source import TRITON_CLASS, told
from services.infer.model_process.python.triton_config import ModelConfig
from services.infer.model_process.python.triton_request import InferenceRequest, InferenceResponse, ResponseSender
from services.infer.model_process.python.triton_tensor import TritonTensor


class TritonModel:
    """A `TritonPythonModel`, initialized."""

    def __init__(self, kind: type[Any], load: Load) -> None:
        """Raises LoadFailed when it has not the interface's methods, or one of them raises."""
        self._file = load.file
        self._loop: asyncio.AbstractEventLoop | None = None
        _check_execute(kind, load)
        config = _completed(kind, load)
        self.facts = _facts(config)
        try:
            self._model = kind()
            if hasattr(self._model, "initialize"):
                self._model.initialize(_arguments(load, config))
        except BaseException as err:
            traceback.print_exc()
            raise LoadFailed(f"initialize failed: {told(err, load.file)}") from err

    def run(self, batch: Batch) -> Given:
        senders = [_OneResponse() for _ in batch.details]
        requests = [
            _bound(r, ResponseSender(s, batch.outputs), batch) for r, s in zip(_requests(batch), senders, strict=True)
        ]
        count = len(requests)
        responses = self._executed(requests)
        del requests  # With them go senders that the model did not take.
        if responses is None:
            responses = [None] * count
        if not isinstance(responses, Sequence) or isinstance(responses, str | bytes):
            raise RunFailed(f"execute returned a {type(responses).__name__}: expected a list of InferenceResponse")
        if len(responses) != count:
            raise RunFailed(f"execute returned {len(responses)} responses for {count} requests")
        parts: list[TensorPart] = []
        told_of = [_taken(r, s, batch.outputs, parts) for r, s in zip(responses, senders, strict=True)]
        return Given(parts, told_of)

    def start(self, batch: Batch, sender: Sender) -> Iterator[None] | None:
        response_sender = ResponseSender(sender, batch.outputs)
        requests = [_bound(request, response_sender, batch) for request in _requests(batch)]
        try:
            responses = self._executed(requests)
        except RunFailed as err:
            sender.fail(err, final=True)
            return None
        if responses:
            what = "execute of a decoupled model returned responses: expected None, and responses through the sender"
            sender.fail(RunFailed(what), final=True)
        return None

    def _executed(self, requests: list[InferenceRequest]) -> Any:
        try:
            result = self._model.execute(requests)
            return self._awaited(result) if inspect.iscoroutine(result) else result
        except BaseException as err:
            traceback.print_exc()
            message = told(err, self._file)
        raise RunFailed(message)  # Outside: the trace holds the requests, and with them their senders.

    def _awaited(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        if hasattr(self._model, "finalize"):
            self._model.finalize()


class _OneResponse:
    """The Sender of a request whose model answers once."""

    def __init__(self) -> None:
        self._responses: queue.SimpleQueue[Sequence[TensorPart] | RunFailed | None] = queue.SimpleQueue()
        self._sent = 0

    def send(self, parts: Sequence[TensorPart], *, final: bool) -> None:
        if self._sent:
            raise RunFailed("a model that is not decoupled gives one response to a request")
        self._sent += 1
        self._responses.put(parts)

    def fail(self, error: RunFailed, *, final: bool) -> None:
        if not self._sent:
            self._sent += 1
            self._responses.put(error)

    def end(self) -> None:
        self._responses.put(None)

    def abandon(self) -> None:
        self._responses.put(None)

    def is_cancelled(self) -> bool:
        return False

    def response(self) -> Sequence[TensorPart]:
        """Waits for it. Raises RunFailed when it is an error, or when there will be none."""
        got = self._responses.get()
        if isinstance(got, RunFailed):
            raise got
        if got is None:
            raise RunFailed("execute gave no response to this request")
        return got


def _taken(response: Any, sender: _OneResponse, outputs: Sequence[str], parts: list[TensorPart]) -> dict[str, Any]:
    """What the reply says of one response; its tensors go to `parts`."""
    try:
        if response is None:
            found = list(sender.response())
        elif isinstance(response, InferenceResponse):
            found = response.parts(outputs)
        else:
            raise RunFailed(f"execute returned a {type(response).__name__} in its list: expected an InferenceResponse")
    except RunFailed as err:
        return {"error": str(err)[:1000], "code": err.code, "own": err.is_own}
    parts.extend(found)
    return {"outputs": len(found)}


def _requests(batch: Batch) -> Iterator[InferenceRequest]:
    """One request each, with views of its own rows."""
    at = 0
    for n, said in enumerate(batch.details):
        rows = batch.rows[n] if batch.rows else 0
        inputs = [
            TritonTensor(name, array[at : at + rows] if batch.rows else array, datatype)
            for name, (datatype, array) in batch.inputs.items()
        ]
        at += rows
        yield InferenceRequest(
            said.get("request_id", ""),
            said.get("correlation_id", 0),
            inputs,
            batch.outputs,
            said.get("model_name", ""),
            said.get("model_version", 1),
            said.get("flags", 0),
            said.get("timeout_us", 0),
            parameters=json.dumps(said["parameters"], separators=(",", ":")) if said.get("parameters") else "",
        )


def _bound(request: InferenceRequest, sender: ResponseSender, batch: Batch) -> InferenceRequest:
    request.bind(sender, batch.is_cancelled)
    return request


def _check_execute(kind: type[Any], load: Load) -> None:
    execute = getattr(kind, "execute", None)
    if not callable(execute):
        raise LoadFailed(f"{load.file.name}: {TRITON_CLASS} has no method execute(self, requests)")
    try:
        inspect.signature(execute).bind(None, [])
    except TypeError:
        raise LoadFailed(
            f"{load.file.name}: {TRITON_CLASS}.execute{inspect.signature(execute)} cannot be called as "
            "execute(self, requests)"
        ) from None


def _completed(kind: type[Any], load: Load) -> dict[str, Any]:
    complete = getattr(kind, "auto_complete_config", None)
    given = ModelConfig(load.config)
    if complete is None:
        return given.as_dict()
    try:
        result = complete(given)
    except BaseException as err:
        traceback.print_exc()
        raise LoadFailed(f"auto_complete_config failed: {told(err, load.file)}") from err
    if not isinstance(result, ModelConfig):
        raise LoadFailed(
            f"auto_complete_config returned a {type(result).__name__}: expected the ModelConfig it was given"
        )
    return result.as_dict()


def _facts(config: dict[str, Any]) -> HostedModelInfo:
    try:
        inputs, outputs = specs(config, "input"), specs(config, "output")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise LoadFailed(f"the completed configuration has an input or output that is none: {err}") from err
    for role, found in (("input", inputs), ("output", outputs)):
        if not found:
            raise LoadFailed(f"there is no {role}: write it into config.pbtxt, or add it in auto_complete_config")
    decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
    return HostedModelInfo(
        inputs,
        outputs,
        config=config,
        says_batch=True,
        wants_requests=True,
        is_decoupled=decoupled,
        is_tried=False,
    )


def _arguments(load: Load, config: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU",
        "model_instance_name": load.instance,
        "model_instance_device_id": "0",
        "model_repository": str(load.folder),
        "model_version": load.version,
        "model_name": load.name,
    }
