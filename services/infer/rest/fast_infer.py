"""infer on the fast path: requests whose JSON equals that of an earlier one differ in their binary tensors alone.

body ──JSON is known?──> request ──scheduler──> outputs ──> response
       └── not known: slow path (`inference.infer`); a template is learnt from it

Errors before the scheduler are the slow path's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from services.infer.fast_path.infer_fast import FastRequest
from services.infer.fast_path.large_request import LARGE_BYTES
from services.infer.fast_path.template import Template, template_of
from services.infer.models.models import Models
from services.infer.models.version import Version
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.tensors import Tensor
from services.infer.rest.call import KnownHead, RestCall
from services.infer.rest.inference import BINARY, BINARY_END, HEADER_LENGTH, begun, described
from services.infer.rest.target import Target
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb

# 8 MiB of JSON. Callers may invent ids, parameters and shapes: beyond it, all is forgotten.
_MAX_KNOWN = 1024
_MAX_JSON_BYTES = 8 << 10
_MAX_LENGTH_DIGITS = 4
# Outputs of one request may have different shapes each time.
_MAX_SHAPES = 4

_UNUSUAL = (b"grpc-timeout", b"content-encoding")
"""Headers of requests for the slow path."""


@dataclass(slots=True, eq=False)
class _Known:
    """A request without its numbers, and its responses without theirs."""

    version: Version
    template: Template
    responses: dict[Any, tuple[KnownHead, bytes]] = field(default_factory=dict)
    """Head and JSON, by the shapes of the outputs."""

    def response(self, outputs: Sequence[Tensor]) -> tuple[KnownHead, bytes]:
        """Return the head and the JSON of a response with `outputs`."""
        shapes = tuple([output.shape for output in outputs])
        found = self.responses.get(shapes)
        if found is None:
            if len(self.responses) >= _MAX_SHAPES:
                self.responses.clear()
            found = self.responses[shapes] = self._response(outputs)
        return found

    def _response(self, outputs: Sequence[Tensor]) -> tuple[KnownHead, bytes]:
        version = self.version
        message = pb.ModelInferResponse(model_name=version.name, model_version=str(version.number))
        listed = [
            described(wanted.spec.name, wanted.spec.datatype.name, output.shape) + BINARY_END % output.nbytes
            for wanted, output in zip(self.template.outputs, outputs, strict=True)
        ]
        json = b"".join((orjson.dumps(begun(message))[:-1], b',"outputs":[', b",".join(listed), b"]}"))
        size = len(json) + sum(output.nbytes for output in outputs)
        return KnownHead(BINARY, ((HEADER_LENGTH, b"%d" % len(json)),), size), json


class FastRestInfer:
    """Starts calls of infer without a task, and learns from those that had one."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._known: dict[tuple[str, str, bytes], _Known] = {}

    def start(self, call: RestCall, body: bytes) -> bool:
        """Start a call and return True when its JSON is known. Raises as `InferenceServer.infer` does."""
        headers, target = call.headers, call.target
        digits = headers.get(HEADER_LENGTH, b"")
        if not digits.isdigit() or len(digits) > _MAX_LENGTH_DIGITS:
            return False
        length = int(digits)
        known = self._known.get((target.model, target.version, body[:length]))
        if known is None or length > len(body) or call.is_retry or any(name in headers for name in _UNUSUAL):
            return False
        request = known.template.request(body, length)
        if request is None:
            return False
        try:
            call.check(target.rpc, None)
            tenant = call.tenant
            version = self._models.find(target.model, target.version)
        except ShoalError:
            return False
        if version is not known.version:
            return False
        _FastRestRequest(call, known).start(request, tenant)
        return True

    def learn(
        self, target: Target, body: bytes, length: int, message: pb.ModelInferRequest, is_binary: Callable[[str], bool]
    ) -> None:
        """Learn from a request with `length` bytes of JSON that succeeded. `is_binary`: the form of an output."""
        size = len(body) - length
        if message.id or length > _MAX_JSON_BYTES or size > LARGE_BYTES:
            return
        try:
            version = self._models.find(target.model, target.version)
            if not version.needs_tensors_only:
                return
            template = template_of(message, version.loaded.model.signature, is_tagged=False)
        # The model has changed since.
        except ShoalError:
            return
        # Values in the JSON are no part of the binary data.
        if template is None or sum(slot.size for slot in template.slots) != size:
            return
        if not all(is_binary(wanted.spec.name) for wanted in template.outputs):
            return
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[target.model, target.version, body[:length]] = _Known(version, template)


class _FastRestRequest(FastRequest):
    """The request of a call."""

    __slots__ = ("_known",)

    _exchange: RestCall

    def __init__(self, call: RestCall, known: _Known) -> None:
        self._exchange = call
        self._version = known.version
        self._known = known

    def succeeded(self, result: InferenceResult) -> None:
        """Called by the scheduler."""
        self._version.__exit__(None, None, None)
        call = self._exchange
        try:
            # A template has no ragged outputs.
            outputs = cast("Sequence[Tensor]", result.outputs)
            head, json = self._known.response(outputs)
            parts: list[Any] = [json]
            for output in outputs:
                parts.append(output if output.flags.c_contiguous else output.tobytes())
            call.reply(head, b"".join(parts))
        # For example without memory for a copy: the caller needs an outcome.
        except Exception as err:
            call.refuse(err)
