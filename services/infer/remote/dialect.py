"""What a remote server speaks: how it is asked about a model, and how tensors become its messages and come back."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from google.protobuf.message import Message

from services.infer.error_text import listed, quoted, written
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces
from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import InvalidArgument


class Question(NamedTuple):
    """A small call."""

    method: str
    message: Message
    kind: type[Message]
    """What the answer is."""


_MOST_DIMS = 64
# NumPy's arrays have no more.


@dataclass(frozen=True)
class RemoteModelInfo:
    """What a remote server says of a model."""

    inputs: tuple[TensorSpec, ...] = ()
    """Whole shapes, with the batch dimension. Empty, with `outputs`: it says nothing."""
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None
    """None: it says nothing. 0: the first dimension is no batch dimension."""


Asking: TypeAlias = Generator[Question, Any, RemoteModelInfo]


class Dialect(Protocol):
    """One protocol, for one model."""

    method: str
    """Of an inference: `/<service>/<name>`."""
    batches: bool
    """Whether a call may carry several rows."""
    fault: str
    """What messages say when the model raised, where the status does not; empty: it does."""

    def __init__(self, settings: RemoteSettings) -> None: ...

    def facts(self) -> Asking:
        """What the server says of the model: yields questions and is sent the answers (`steps`).

        Raises:
            NotServable: it cannot be served from here; the message names why.
            NotToBlame, ModelFailed, ShoalError: what calls raise.
        """

    def request(
        self, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Sequence[Tensor]], outputs: Sequence[str]
    ) -> Pieces:
        """The message for the rows of several calls, in the order of their arrays."""

    def answer(self, data: bytes, outputs: Sequence[TensorSpec]) -> list[Tensor]:
        """The outputs in an answer, in this order. Raises ModelFailed when they are not there."""


def shape_of(arrays: Sequence[Tensor]) -> tuple[int, ...]:
    """Of the rows of all arrays behind each other."""
    first = arrays[0].shape
    return first if len(arrays) == 1 else (sum(array.shape[0] for array in arrays), *first[1:])


def missing(name: str, there: Sequence[str]) -> ModelFailed:
    """The error for an answer without an output."""
    return ModelFailed(f"the remote server's answer has no output {quoted(name)}: it has {listed(there) or 'none'}")


def check_shape(shape: Sequence[int], spec: TensorSpec, what: str) -> None:
    """Raises InvalidArgument when an output is not of the shape that was promised: before anything is made of it."""
    if len(shape) > _MOST_DIMS or (spec.shape and not fits(shape, spec.shape)):
        raise InvalidArgument(f"{what}: expected {written(spec.shape)}, got {written(shape)}")


def changes(before: RemoteModelInfo, now: RemoteModelInfo) -> str:
    """How a model has become another one, in words; empty when those who call the one can call the other."""
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
    there = {spec.name: spec for spec in now}
    found = []
    for spec in before:
        other = there.get(spec.name)
        if other is None:
            found.append(f"{role} {quoted(spec.name)} is gone")
        elif (other.datatype, other.shape) != (spec.datatype, spec.shape):
            found.append(f"{role} {quoted(spec.name)} was {_said(spec)} and is {_said(other)}")
    return found


def _said(spec: TensorSpec) -> str:
    return f"{spec.datatype.name} {written(spec.shape)}"
