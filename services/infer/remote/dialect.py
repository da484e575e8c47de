"""Dialect: the protocol of a remote server. Queries a model's metadata, and converts tensors to and from messages."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from google.protobuf.message import Message

from services.infer.error_text import listed, quoted
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces
from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import InvalidArgument
from shoal.oip.limits import MAX_DIMS
from shoal.oip.tensors import shape_text


class MetadataCall(NamedTuple):
    """One small call of a metadata query."""

    method: str
    message: Message
    response_type: type[Message]


@dataclass(frozen=True)
class RemoteModelInfo:
    """Metadata of a model, as the remote server reports it."""

    inputs: tuple[TensorSpec, ...] = ()
    """Whole shapes, with the batch dimension. Empty, like `outputs`, when the server reports no tensors."""
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None
    """None: not reported. 0: the first dimension is no batch dimension."""


MetadataCalls: TypeAlias = Generator[MetadataCall, Any, RemoteModelInfo]


class Dialect(Protocol):
    """Protocol of one remote server, for one model."""

    method: str
    """gRPC method of an inference: `/<service>/<name>`."""
    batches: bool
    """True when a request may have several rows."""
    fault_text: str
    """Text in the messages of errors that the model raised; empty: the status tells them apart."""

    def __init__(self, settings: RemoteSettings) -> None: ...

    def model_info(self) -> MetadataCalls:
        """Query the model's metadata: a generator that yields calls and is sent the responses (`sans_io`).

        Raises:
            NotServable: the model cannot be served from here; the message has the reason.
            BatchFailed, ModelFailed, ShoalError: errors of the calls.
        """

    def request(
        self, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Sequence[Tensor]], outputs: Sequence[str]
    ) -> Pieces:
        """Return the inference message for the rows of several requests, in the order of their arrays."""

    def parse_response(self, data: bytes, outputs: Sequence[TensorSpec]) -> list[Tensor]:
        """Return these outputs of a serialized response. Raises ModelFailed when one is missing or wrong."""


def shape_of(arrays: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the shape of all arrays concatenated along the first dimension."""
    first = arrays[0].shape
    return first if len(arrays) == 1 else (sum(array.shape[0] for array in arrays), *first[1:])


def missing(name: str, present: Sequence[str]) -> ModelFailed:
    """Return the error for a response without the output `name`."""
    return ModelFailed(f"the remote server's response has no output {quoted(name)}: it has {listed(present) or 'none'}")


def check_shape(shape: Sequence[int], spec: TensorSpec, what: str) -> None:
    """Raise InvalidArgument when an output's shape contradicts the spec. Checked before the data is read."""
    if len(shape) > MAX_DIMS or (spec.shape and not fits(shape, spec.shape)):
        raise InvalidArgument(f"{what}: expected {shape_text(spec.shape)}, got {shape_text(shape)}")


def changes(before: RemoteModelInfo, now: RemoteModelInfo) -> str:
    """Describe the incompatible changes of a model's metadata; empty when requests for `before` fit `now`."""
    found = [
        *_changed("input", before.inputs, now.inputs),
        *_changed("output", before.outputs, now.outputs),
    ]
    known = {spec.name for spec in before.inputs}
    found += [f"input {quoted(s.name)} is new" for s in now.inputs if s.name not in known and not s.is_optional]
    rows, was = now.max_batch_size, before.max_batch_size
    if was and rows is not None and rows < was:
        found.append(f"max_batch_size was {was} and is {rows}")
    return "; ".join(found)


def _changed(role: str, before: Sequence[TensorSpec], now: Sequence[TensorSpec]) -> list[str]:
    present = {spec.name: spec for spec in now}
    found = []
    for spec in before:
        other = present.get(spec.name)
        if other is None:
            found.append(f"{role} {quoted(spec.name)} no longer exists")
        elif (other.datatype, other.shape) != (spec.datatype, spec.shape):
            found.append(f"{role} {quoted(spec.name)} was {_spec_text(spec)} and is {_spec_text(other)}")
    return found


def _spec_text(spec: TensorSpec) -> str:
    return f"{spec.datatype.name} {shape_text(spec.shape)}"
