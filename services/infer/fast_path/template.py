"""Requests like one that was read before: their bytes are compared, not parsed.

A client sends the same message again and again with other numbers in it. What stays the same, the head, is looked up:

    | 1 model_name | 2 model_version | 3 id | 5 inputs ..., 6 outputs ... | 7 raw_input_contents ... |
      named: a key                     any    head: a key                   where the head says, and as long

Whatever is not exactly so is parsed, as ever. A template is made of a request that was parsed and fits its model, so a
request that matches one fits too. Format: protobuf's wire format, fields in the order of their numbers, as all known
libraries write them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesh.rpc.framing import PREFIX_BYTES
from services.infer.models.version import Version
from services.infer.requests import parameters, request
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from shoal.inference.v2 import inference_pb2 as pb

NAME, VERSION, ID, RAW_INPUT, RAW_OUTPUT = 0x0A, 0x12, 0x1A, 0x3A, 0x32
"""Tags: the field's number and wire type 2 (length-delimited)."""

_MOST_TEMPLATES = 64
_MOST_SHAPES = 256
# Of one model: clients that send any number of rows have as many heads. Beyond that they are parsed.


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one input's numbers are, after the head."""

    name: str
    dtype: np.dtype[Any]
    elements: int
    shape: tuple[int, ...]
    opening: bytes
    """Tag and length."""
    size: int
    """Bytes of numbers."""


@dataclass(frozen=True, slots=True)
class Opening:
    """All of an answer but its id and its numbers, for outputs of given shapes."""

    outputs: bytes
    raw: tuple[bytes, ...]
    """Before each output's numbers: tag and length."""
    size: int
    """Bytes of the answer without its id."""


@dataclass(slots=True, eq=False)
class Template:
    """One head, read."""

    slots: tuple[Slot, ...]
    outputs: tuple[WantedOutput, ...]
    rows: int
    size_bytes: int
    key: Hashable
    openings: dict[Any, Opening] = field(default_factory=dict)
    """By the shapes of the outputs."""

    def call(self, body: bytes, at: int) -> InferenceRequest | None:
        """The call whose numbers begin at `at` of `body`; None when they are not as the head says. Copies nothing."""
        inputs: dict[str, Tensor] = {}
        for slot in self.slots:
            start = at + len(slot.opening)
            if body[at:start] != slot.opening:
                return None
            at = start + slot.size
            if at > len(body):
                return None
            inputs[slot.name] = np.frombuffer(body, slot.dtype, slot.elements, start).reshape(slot.shape)
        if at != len(body):
            return None
        return InferenceRequest(inputs, self.outputs, self.rows, self.size_bytes, self.key, parameters.NONE)

    def opening(self, prefix: bytes, outputs: Sequence[Tensor]) -> Opening:
        """The opening of an answer with these outputs; `prefix` is its model and version."""
        shapes = outputs[0].shape if len(outputs) == 1 else tuple([output.shape for output in outputs])
        known = self.openings.get(shapes)
        if known is None:
            if len(self.openings) >= _MOST_SHAPES:
                self.openings.clear()
            known = self.openings[shapes] = _opening(prefix, self.outputs, outputs)
        return known


@dataclass(slots=True, eq=False)
class ModelTemplates:
    """What is known of one model under one name and version, as a request writes them."""

    name: str
    number: str
    """As the request has it: may be empty."""
    version: Version
    prefix: bytes
    """The answer's model_name and model_version."""
    templates: dict[bytes, Template] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    """Of the heads in `templates`."""

    def add(self, head: bytes, template: Template) -> None:
        if len(self.templates) >= _MOST_TEMPLATES:
            del self.templates[next(iter(self.templates))]
        self.templates[head] = template
        self.lengths = tuple(dict.fromkeys(map(len, reversed(self.templates))))


def model_templates(version: Version, asked: pb.ModelInferRequest) -> ModelTemplates:
    answer = pb.ModelInferResponse(model_name=version.name, model_version=str(version.number))
    return ModelTemplates(asked.model_name, asked.model_version, version, answer.SerializeToString())


def learn(body: bytes, asked: pb.ModelInferRequest, signature: Signature) -> tuple[bytes, bytes, Template] | None:
    """The named part, the head and the template of a request that was answered; None when it has no such form."""
    # First of all what is cheap to see: texts would be read a second time, on the event loop, and in vain.
    if asked.parameters or not _has_numbers_only(asked):
        return None
    call = request.read(asked, signature)
    slots = _slots(asked, call)
    if slots is None:
        return None
    raw_at = len(body) - sum(len(slot.opening) + slot.size for slot in slots)
    before = pb.ModelInferRequest(model_name=asked.model_name, model_version=asked.model_version).SerializeToString()
    id_bytes = len(asked.id.encode())
    head_at = PREFIX_BYTES + len(before) + (2 + id_bytes if id_bytes else 0)
    head = body[head_at:raw_at]
    if id_bytes > 127 or not body.startswith(before, PREFIX_BYTES) or not head:
        return None
    if not _is_head_of(head, asked) or Template(slots, (), 0, 0, None).call(body, raw_at) is None:
        return None
    return before, head, Template(slots, call.outputs, call.rows, call.size_bytes, call.key)


def _has_numbers_only(asked: pb.ModelInferRequest) -> bool:
    """Whether its inputs are raw bytes of which nothing has to be looked at."""
    if len(asked.raw_input_contents) != len(asked.inputs):
        return False
    return not any(given.datatype in ("BYTES", "BOOL") for given in asked.inputs)


def _slots(asked: pb.ModelInferRequest, call: InferenceRequest) -> tuple[Slot, ...] | None:
    if any(wanted.classes or wanted.spec.datatype.is_bytes or wanted.spec.is_ragged for wanted in call.outputs):
        return None
    slots = []
    for given in asked.inputs:
        array = call.tensors[given.name]
        opening = _opened(RAW_INPUT, array.nbytes)
        slots.append(Slot(given.name, array.dtype, array.size, array.shape, opening, array.nbytes))
    return tuple(slots)


def _is_head_of(head: bytes, asked: pb.ModelInferRequest) -> bool:
    """Whether `head` is all of the inputs and outputs, and nothing else."""
    try:
        read = pb.ModelInferRequest.FromString(head)
    except Exception:  # DecodeError: the bytes are cut at another place than we thought.
        return False
    same = pb.ModelInferRequest(inputs=asked.inputs, outputs=asked.outputs)
    return read == same


def _opening(prefix: bytes, wanted: Sequence[WantedOutput], outputs: Sequence[Tensor]) -> Opening:
    answer = pb.ModelInferResponse()
    for want, output in zip(wanted, outputs, strict=True):
        answer.outputs.add(name=want.spec.name, datatype=want.spec.datatype.name, shape=output.shape)
    heads = answer.SerializeToString()
    raw = tuple(_opened(RAW_OUTPUT, output.nbytes) for output in outputs)
    size = len(prefix) + len(heads) + sum(map(len, raw)) + sum(output.nbytes for output in outputs)
    return Opening(heads, raw, size)


def _opened(tag: int, size: int) -> bytes:
    """Tag and length of a field of `size` bytes."""
    out = bytearray([tag])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)
