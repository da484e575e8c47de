"""Message templates: a message with the form of an earlier one is compared by its bytes, not parsed.

A client sends the same message again and again with other numbers in it. The constant part, the head, is looked up:

    | 1 model_name | 2 model_version | 3 id | 5 inputs ..., 6 outputs ... | 7 raw_input_contents ... |
      name bytes: a key                any    head: a key                   at the head's offsets and sizes

Any other message is parsed. A template is made from a parsed message that fits its model, so that every message that
matches the template fits, too. Format: protobuf's wire format, fields in the order of their numbers, as all known
libraries write them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesh.rpc.framing import PREFIX_BYTES
from services.infer.models.version import Version
from services.infer.requests import parameters
from services.infer.requests.request import InferenceRequest, WantedOutput, read
from services.infer.requests.response import RAW_OUTPUT, tag_and_length
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from shoal.inference.v2 import inference_pb2 as pb

NAME, VERSION, ID, RAW_INPUT = 0x0A, 0x12, 0x1A, 0x3A
"""Tags: the field's number and wire type 2 (length-delimited)."""

# Bounds of one model: a client that varies the number of rows sends one head for each number.
# A message beyond the bounds is parsed.
_MAX_TEMPLATES = 64
_MAX_HEAD_BYTES = 16 << 10
_MAX_SHAPES = 256


@dataclass(frozen=True, slots=True)
class Slot:
    """Position of one input's numbers after the head."""

    name: str
    dtype: np.dtype[Any]
    elements: int
    shape: tuple[int, ...]
    tag_and_length: bytes
    size: int
    """Bytes of numbers."""


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """A response without its id and numbers, for outputs of certain shapes."""

    outputs: bytes
    raw: tuple[bytes, ...]
    """Before each output's numbers: tag and length."""
    size: int
    """Bytes of the response without its id."""


@dataclass(slots=True, eq=False)
class Template:
    """The request that a head describes."""

    slots: tuple[Slot, ...]
    outputs: tuple[WantedOutput, ...]
    rows: int
    size_bytes: int
    key: Hashable
    response_templates: dict[Any, ResponseTemplate] = field(default_factory=dict)
    """By the shapes of the outputs."""

    def request(self, body: bytes, at: int) -> InferenceRequest | None:
        """Return the request whose numbers begin at `at` of `body`, or None when they do not match. Copies nothing."""
        inputs: dict[str, Tensor] = {}
        for slot in self.slots:
            start = at + len(slot.tag_and_length)
            if body[at:start] != slot.tag_and_length:
                return None
            at = start + slot.size
            if at > len(body):
                return None
            inputs[slot.name] = np.frombuffer(body, slot.dtype, slot.elements, start).reshape(slot.shape)
        if at != len(body):
            return None
        return InferenceRequest(inputs, self.outputs, self.rows, self.size_bytes, self.key, parameters.NONE)

    def response_template(self, prefix: bytes, outputs: Sequence[Tensor]) -> ResponseTemplate:
        """Return the template of a response with `outputs`; `prefix` is its model and version."""
        shapes = outputs[0].shape if len(outputs) == 1 else tuple([output.shape for output in outputs])
        known = self.response_templates.get(shapes)
        if known is None:
            if len(self.response_templates) >= _MAX_SHAPES:
                self.response_templates.clear()
            known = self.response_templates[shapes] = _response_template(prefix, self.outputs, outputs)
        return known


@dataclass(slots=True, eq=False)
class ModelTemplates:
    """Templates of one model under one name and version, as messages write them."""

    name: str
    number: str
    """Version as the message has it: may be empty."""
    version: Version
    prefix: bytes
    """The response's model_name and model_version."""
    templates: dict[bytes, Template] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    """Lengths of the heads in `templates`."""

    def add(self, head: bytes, template: Template) -> None:
        if len(self.templates) >= _MAX_TEMPLATES:
            del self.templates[next(iter(self.templates))]
        self.templates[head] = template
        self.lengths = tuple(dict.fromkeys(map(len, reversed(self.templates))))


def model_templates(version: Version, message: pb.ModelInferRequest) -> ModelTemplates:
    response = pb.ModelInferResponse(model_name=version.name, model_version=str(version.number))
    return ModelTemplates(message.model_name, message.model_version, version, response.SerializeToString())


def learn(body: bytes, message: pb.ModelInferRequest, signature: Signature) -> tuple[bytes, bytes, Template] | None:
    """Return the name bytes, head and template of a message that succeeded; None when it cannot have a template."""
    found = template_of(message, signature)
    if found is None:
        return None
    raw_at = len(body) - sum(len(slot.tag_and_length) + slot.size for slot in found.slots)
    name_bytes = pb.ModelInferRequest(
        model_name=message.model_name, model_version=message.model_version
    ).SerializeToString()
    id_bytes = len(message.id.encode())
    head_at = PREFIX_BYTES + len(name_bytes) + (2 + id_bytes if id_bytes else 0)
    if id_bytes > 127 or not body.startswith(name_bytes, PREFIX_BYTES) or not 0 < raw_at - head_at <= _MAX_HEAD_BYTES:
        return None
    head = body[head_at:raw_at]
    if not _is_head(head, message) or found.request(body, raw_at) is None:
        return None
    return name_bytes, head, found


def template_of(message: pb.ModelInferRequest, signature: Signature, *, is_tagged: bool = True) -> Template | None:
    """Return the template of a message that succeeded; None when it cannot have one.

    Args:
        is_tagged: a tag and a length precede the numbers of each input, as in a message.
    """
    # The cheap checks first: reading BYTES inputs again would block the event loop for nothing.
    if message.parameters or not _has_numbers_only(message):
        return None
    request = read(message, signature)
    slots = _slots(message, request, is_tagged=is_tagged)
    return None if slots is None else Template(slots, request.outputs, request.rows, request.size_bytes, request.key)


def _has_numbers_only(message: pb.ModelInferRequest) -> bool:
    """Return True when all inputs are raw numbers, which need no check."""
    if len(message.raw_input_contents) != len(message.inputs):
        return False
    return not any(tensor.datatype in ("BYTES", "BOOL") for tensor in message.inputs)


def _slots(message: pb.ModelInferRequest, request: InferenceRequest, *, is_tagged: bool) -> tuple[Slot, ...] | None:
    if any(
        requested.classes or requested.spec.datatype.is_bytes or requested.spec.is_ragged
        for requested in request.outputs
    ):
        return None
    slots = []
    for tensor in message.inputs:
        array = request.tensors[tensor.name]
        before = tag_and_length(RAW_INPUT, array.nbytes) if is_tagged else b""
        slots.append(Slot(tensor.name, array.dtype, array.size, array.shape, before, array.nbytes))
    return tuple(slots)


def _is_head(head: bytes, message: pb.ModelInferRequest) -> bool:
    """Return True when `head` holds exactly the message's inputs and outputs."""
    try:
        parsed = pb.ModelInferRequest.FromString(head)
    # DecodeError: the bytes are not cut between two fields.
    except Exception:
        return False
    same = pb.ModelInferRequest(inputs=message.inputs, outputs=message.outputs)
    return parsed == same


def _response_template(prefix: bytes, requested: Sequence[WantedOutput], outputs: Sequence[Tensor]) -> ResponseTemplate:
    response = pb.ModelInferResponse()
    for requested_output, output in zip(requested, outputs, strict=True):
        response.outputs.add(
            name=requested_output.spec.name, datatype=requested_output.spec.datatype.name, shape=output.shape
        )
    heads = response.SerializeToString()
    raw = tuple(tag_and_length(RAW_OUTPUT, output.nbytes) for output in outputs)
    size = len(prefix) + len(heads) + sum(map(len, raw)) + sum(output.nbytes for output in outputs)
    return ResponseTemplate(heads, raw, size)
