"""Triton's interface of `model.py`, unchanged: `TritonPythonModel` with initialize, execute and finalize.

`execute` takes the requests of one batch, each with its own rows, and returns a response for each. A model may also
send the response through a request's response sender. A decoupled model always does, any number of times.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

from services.infer.model_process.hosted import (
    Batch,
    BatchResult,
    HostedModelInfo,
    Load,
    LoadFailed,
    RunFailed,
    Sender,
    print_error,
)
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.python.config_form import specs
from services.infer.model_process.python.source import TRITON_CLASS, error_line
from services.infer.model_process.python.triton_config import ModelConfig
from services.infer.model_process.python.triton_request import InferenceRequest, InferenceResponse, ResponseSender
from services.infer.model_process.python.triton_tensor import TritonTensor


class TritonModel:
    """`hosted.Hosted` for a `TritonPythonModel`."""

    def __init__(self, kind: type[Any], load: Load) -> None:
        """Create and initialize the model. Raises LoadFailed when a method is missing or raises."""
        self._file = load.file
        self._loop: asyncio.AbstractEventLoop | None = None
        _check_execute(kind, load)
        config = _completed(kind, load)
        self.model_info = _facts(config)
        try:
            self._model = kind()
            if hasattr(self._model, "initialize"):
                self._model.initialize(_arguments(load, config))
        except BaseException as err:
            print_error(err)
            raise LoadFailed(f"initialize failed: {error_line(err, load.file)}") from err

    def run(self, batch: Batch) -> BatchResult:
        senders = [_OneResponse() for _ in batch.details]
        requests = [
            _bound(r, ResponseSender(s, batch.outputs), batch) for r, s in zip(_requests(batch), senders, strict=True)
        ]
        count = len(requests)
        responses = self._execute(requests)
        # Deletes response senders that the model has not taken: their finalizers end their requests.
        del requests
        if responses is None:
            responses = [None] * count
        if not isinstance(responses, Sequence) or isinstance(responses, str | bytes):
            raise RunFailed(f"execute returned a {type(responses).__name__}: expected a list of InferenceResponse")
        if len(responses) != count:
            raise RunFailed(f"execute returned {len(responses)} responses for {count} requests")
        parts: list[TensorPart] = []
        entries = [_response_entry(r, s, batch.outputs, parts) for r, s in zip(responses, senders, strict=True)]
        return BatchResult(parts, entries)

    def start(self, batch: Batch, sender: Sender) -> Iterator[None] | None:
        response_sender = ResponseSender(sender, batch.outputs)
        requests = [_bound(request, response_sender, batch) for request in _requests(batch)]
        try:
            responses = self._execute(requests)
        except RunFailed as err:
            sender.fail(err, final=True)
            return None
        if responses:
            text = "execute of a decoupled model returned responses: expected None, and responses through the sender"
            sender.fail(RunFailed(text), final=True)
        return None

    def _execute(self, requests: list[InferenceRequest]) -> Any:
        try:
            result = self._model.execute(requests)
            return self._run_coroutine(result) if inspect.iscoroutine(result) else result
        except BaseException as err:
            print_error(err)
            message = error_line(err, self._file)
        # Raised outside of `except`: as a cause, the model's error would keep the requests and their senders alive.
        raise RunFailed(message)

    def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        if hasattr(self._model, "finalize"):
            self._model.finalize()


class _OneResponse:
    """`hosted.Sender` of one request of a model that is not decoupled."""

    def __init__(self) -> None:
        self._responses: queue.SimpleQueue[Sequence[TensorPart] | RunFailed | None] = queue.SimpleQueue()
        self._sent = 0

    def send(self, parts: Sequence[TensorPart], *, final: bool) -> None:
        if self._sent:
            raise RunFailed("a model that is not decoupled sends one response to a request")
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
        """Wait for the response. Raises RunFailed when the response is an error, or when the model sends none."""
        response = self._responses.get()
        if isinstance(response, RunFailed):
            raise response
        if response is None:
            raise RunFailed("execute sent no response to this request")
        return response


def _response_entry(
    response: Any, sender: _OneResponse, outputs: Sequence[str], parts: list[TensorPart]
) -> dict[str, Any]:
    """Append a response's tensors to `parts` and return the response's entry for `BatchResult.responses`."""
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
    """Yield the requests of a batch; the inputs of each are views of its own rows."""
    at = 0
    for n, info in enumerate(batch.details):
        rows = batch.rows[n] if batch.rows else 0
        inputs = [
            TritonTensor(name, array[at : at + rows] if batch.rows else array, datatype)
            for name, (datatype, array) in batch.inputs.items()
        ]
        at += rows
        yield InferenceRequest(
            info.get("request_id", ""),
            info.get("correlation_id", 0),
            inputs,
            batch.outputs,
            info.get("model_name", ""),
            info.get("model_version", 1),
            info.get("flags", 0),
            info.get("timeout_us", 0),
            parameters=json.dumps(info["parameters"], separators=(",", ":")) if info.get("parameters") else "",
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
    config = ModelConfig(load.config)
    if complete is None:
        return config.as_dict()
    try:
        result = complete(config)
    except BaseException as err:
        print_error(err)
        raise LoadFailed(f"auto_complete_config failed: {error_line(err, load.file)}") from err
    if not isinstance(result, ModelConfig):
        raise LoadFailed(
            f"auto_complete_config returned a {type(result).__name__}: expected the ModelConfig of its argument"
        )
    return result.as_dict()


def _facts(config: dict[str, Any]) -> HostedModelInfo:
    try:
        inputs, outputs = specs(config, "input"), specs(config, "output")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise LoadFailed(f"the completed configuration has an invalid input or output: {err}") from err
    for role, found in (("input", inputs), ("output", outputs)):
        if not found:
            raise LoadFailed(f"there is no {role}: write it into config.pbtxt, or add it in auto_complete_config")
    decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
    return HostedModelInfo(
        inputs,
        outputs,
        config=config,
        sets_max_batch_size=True,
        wants_requests=True,
        is_decoupled=decoupled,
        allows_trial_run=False,
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
