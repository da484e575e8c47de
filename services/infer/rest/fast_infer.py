"""infer on the fast path: requests that differ from an earlier one in their numbers alone.

body ──the rest is known?──> request ──scheduler──> outputs ──> response
       └── not known: slow path (`inference.infer`); a template is learnt from it

    {"inputs":[...]} raw raw ...                       binary tensors, both ways: the JSON is known
    {"inputs":[{..."data": [1,2]}]}                    one small flat list, and JSON outputs: its surroundings are

Errors before the scheduler are the slow path's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import orjson

from mesh.h2.stream import SMALL_BODY
from mesh.rest import tensor_json
from mesh.rest.call import JSON, KnownHead, Reply, RestCall
from mesh.rest.infer_request import Wanted
from mesh.rest.target import Target
from services.infer.fast_path.infer_fast import FastRequest, slow_request
from services.infer.fast_path.large_request import LARGE_BYTES
from services.infer.fast_path.template import Template, template_of
from services.infer.models.models import Models
from services.infer.models.version import Version
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from services.infer.rest.response import BINARY, BINARY_END, HEADER_LENGTH, begun, described, write
from services.infer.scheduling.crash_guard import is_retry
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME, Datatype

# 8 MiB of JSON. Callers may invent ids, parameters and shapes: beyond it, all is forgotten.
_MAX_KNOWN = 1024
_MAX_JSON_BYTES = 8 << 10
_MAX_LENGTH_DIGITS = 4
# Outputs of one request may have different shapes each time.
_MAX_SHAPES = 4
# Numbers that are written as JSON at once: 0.2 ms.
_MAX_WRITTEN = 4 << 10

_DATA = b'"data":'

_UNUSUAL = (b"grpc-timeout", b"content-encoding")
"""Headers of requests for the slow path."""


@dataclass(slots=True, eq=False)
class _Known:
    """A request without its numbers, and its responses without theirs."""

    version: Version
    template: Template
    datatype: Datatype | None = None
    """Of the only input, when tensors are JSON. None: inputs and outputs are binary."""
    responses: dict[Any, Any] = field(default_factory=dict)
    """The constant part of a response, by the shapes of the outputs."""

    def constant(self, outputs: Sequence[Tensor]) -> Any:
        """Return what responses with outputs of these shapes have in common."""
        shapes = tuple([output.shape for output in outputs])
        found = self.responses.get(shapes)
        if found is None:
            if len(self.responses) >= _MAX_SHAPES:
                self.responses.clear()
            make = self._binary_constant if self.datatype is None else self._described
            found = self.responses[shapes] = make(outputs)
        return found

    def _described(self, outputs: Sequence[Tensor]) -> list[bytes]:
        """Return the JSON before the data of each output."""
        version = self.version
        message = pb.ModelInferResponse(model_name=version.name, model_version=str(version.number))
        opening = orjson.dumps(begun(message))[:-1] + b',"outputs":['
        found = []
        for wanted, output in zip(self.template.outputs, outputs, strict=True):
            found.append(opening + described(wanted.spec.name, wanted.spec.datatype.name, output.shape))
            opening = b","
        return found

    def _binary_constant(self, outputs: Sequence[Tensor]) -> tuple[KnownHead, bytes]:
        sizes = [output.nbytes for output in outputs]
        pairs = zip(self._described(outputs), sizes, strict=True)
        json = b"".join([opening + BINARY_END % size for opening, size in pairs]) + b"]}"
        return KnownHead(BINARY, ((HEADER_LENGTH, b"%d" % len(json)),), len(json) + sum(sizes)), json

    def binary_response(self, outputs: Sequence[Tensor]) -> tuple[KnownHead, bytes]:
        """Return the head and the body of a response with binary tensors."""
        head, json = self.constant(outputs)
        parts: list[Any] = [json]
        for output in outputs:
            parts.append(output if output.flags.c_contiguous else output.tobytes())
        return head, b"".join(parts)

    def json_response(self, outputs: Sequence[Tensor]) -> tuple[KnownHead, bytes]:
        """Return the head and the body of a response as JSON."""
        parts: list[bytes] = []
        for opening, wanted, output in zip(self.constant(outputs), self.template.outputs, outputs, strict=True):
            values = np.frombuffer(output.tobytes(), wanted.spec.datatype.dtype)
            parts += [opening, b',"data":[', tensor_json.written(values, wanted.spec.name), b"]}"]
        parts.append(b"]}")
        body = b"".join(parts)
        return KnownHead(JSON, (), len(body)), body

    async def write(self, outputs: Sequence[Tensor], call: RestCall) -> Reply:
        """Return a response as JSON with many numbers."""
        version = self.version
        message = pb.ModelInferResponse(model_name=version.name, model_version=str(version.number))
        for wanted, output in zip(self.template.outputs, outputs, strict=True):
            message.outputs.add(name=wanted.spec.name, datatype=wanted.spec.datatype.name, shape=output.shape)
            message.raw_output_contents.append(output.tobytes())
        return await write(message, Wanted(), call)


class FastRestInfer:
    """Starts calls of infer without a task, and learns from those that had one."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._known: dict[tuple[str, str, bytes], _Known] = {}
        self._known_around: dict[tuple[str, str, bytes, bytes], _Known] = {}
        """By the JSON before and after the data of the only input."""

    def start(self, call: RestCall, body: bytes) -> bool:
        """Start a call and return True when it is known. Raises as `InferenceServer.infer` does."""
        headers, target = call.headers, call.target
        digits = call.header(HEADER_LENGTH)
        found = self._read_json(target, body) if digits is None else self._read_binary(target, body, digits)
        if found is None or is_retry(headers) or any(name in headers for name in _UNUSUAL):
            return False
        known, request = found
        try:
            call.check(target.rpc, None)
            tenant, limits = call.tenant, call.limits
            version = self._models.find(target.model, target.version)
        except ShoalError:
            return False
        if version is not known.version:
            return False
        if tenant:
            self._models.tenants.add(tenant, request.rows)
        _FastRestRequest(call, known).start(request, tenant, limits, len(body))
        return True

    def _read_binary(self, target: Target, body: bytes, digits: bytes) -> tuple[_Known, InferenceRequest] | None:
        if not digits.isdigit() or len(digits) > _MAX_LENGTH_DIGITS:
            return None
        length = int(digits)
        known = self._known.get((target.model, target.version, body[:length]))
        if known is None or length > len(body):
            return None
        request = known.template.request(body, length)
        return None if request is None else (known, request)

    def _read_json(self, target: Target, body: bytes) -> tuple[_Known, InferenceRequest] | None:
        cut = _around(body)
        if cut is None:
            return None
        start, end = cut
        known = self._known_around.get((target.model, target.version, body[:start], body[end:]))
        if known is None or known.datatype is None:
            return None
        try:
            raw = tensor_json.packed(orjson.loads(body[start:end]), known.datatype, "")
        # The slow path says why.
        except (ValueError, ShoalError):
            return None
        request = known.template.request(raw, 0)
        return None if request is None else (known, request)

    def learn(
        self, target: Target, body: bytes, length: int, message: pb.ModelInferRequest, is_binary: Callable[[str], bool]
    ) -> None:
        """Learn from a request with `length` bytes of JSON that succeeded. `is_binary`: the form of an output."""
        size = len(body) - length
        if message.id or length > _MAX_JSON_BYTES or size > LARGE_BYTES:
            return
        # The cheap checks first: some requests are never learnt.
        cut = None if size else _learnt_around(body)
        if not size and cut is None:
            return
        try:
            version = self._models.find(target.model, target.version)
            if not version.needs_tensors_only:
                return
            signature = version.loaded.model.signature
            names = [output.name for output in message.outputs] or [spec.name for spec in signature.outputs]
            if {is_binary(name) for name in names} != {cut is None}:
                return
            template = template_of(message, signature, is_tagged=False)
        # The model has changed since.
        except ShoalError:
            return
        if template is None:
            return
        if len(self._known) + len(self._known_around) >= _MAX_KNOWN:
            self._known.clear()
            self._known_around.clear()
        if cut is not None:
            if _is_carried(template):
                key = target.model, target.version, body[: cut[0]], body[cut[1] :]
                self._known_around[key] = _Known(version, template, BY_NAME[message.inputs[0].datatype])
        # Values in the JSON are no part of the binary data.
        elif sum(slot.size for slot in template.slots) == size:
            self._known[target.model, target.version, body[:length]] = _Known(version, template)


def _is_carried(template: Template) -> bool:
    """Return True when JSON carries the outputs."""
    return not any(wanted.spec.datatype.name in tensor_json.BINARY_ONLY for wanted in template.outputs)


def _around(body: bytes) -> tuple[int, int] | None:
    """Return the begin and the end of a small flat list of data in JSON; None when there is none."""
    if len(body) > SMALL_BODY:
        return None
    start = body.find(_DATA) + len(_DATA)
    end = body.find(b"]", start) + 1
    return (start, end) if start >= len(_DATA) and end else None


def _learnt_around(body: bytes) -> tuple[int, int] | None:
    """Return the same as `_around` when any list in that place is the data of the only input.

    JSON that is valid with one value in a place is valid with any, and has the same members around it.
    """
    cut = _around(body)
    if cut is None:
        return None
    try:
        flat = orjson.loads(body[cut[0] : cut[1]])
        inputs = orjson.loads(b"%b0%b" % (body[: cut[0]], body[cut[1] :])).get("inputs")
    # The list is nested, or the text is inside of another one.
    except ValueError:
        return None
    is_only = type(flat) is list and type(inputs) is list and len(inputs) == 1
    return cut if is_only and inputs[0].get("data") == 0 else None


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
        if self._reservation is not None:
            self._reservation.end()
        call, known = self._exchange, self._known
        if result.queue_ns + result.times.compute_ns > self._version.slow_ns:
            call.keep_slow(*slow_request(self._version, result))
        try:
            # A template has no ragged outputs.
            outputs = cast("Sequence[Tensor]", result.outputs)
            if known.datatype is None:
                call.reply(*known.binary_response(outputs))
            elif sum([output.size for output in outputs]) > _MAX_WRITTEN:
                call.reply_later(partial(known.write, outputs, call))
            else:
                call.reply(*known.json_response(outputs))
        # For example without memory for a copy: the caller needs an outcome.
        except Exception as err:
            call.refuse(err)
