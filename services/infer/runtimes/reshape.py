"""`reshape` of a configuration: the shape that the model sees, where it differs from the one that clients send.

    clients: dims [4]  ──>  model: reshape [2, 2]          with a batch: [n, 4] ──> [n, 2, 2]
    clients: dims [1]  ──>  model: reshape [], a scalar    with a batch: [n, 1] ──> [n]

A -1 of `dims` becomes the -1 of the same order in `reshape`. The session is wrapped when the model is loaded, so models
without reshape pay nothing. Model processes import this module: it needs no protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from services.infer.error_text import written
from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import FailedPrecondition

if TYPE_CHECKING:
    from shoal.inference.v2 import model_config_pb2 as pb


def wrong(what: str, tensor: pb.ModelInput | pb.ModelOutput) -> Iterator[str]:
    """What is wrong with the reshape of `tensor`."""
    if not tensor.HasField("reshape"):
        return
    dims, shape = list(tensor.dims), list(tensor.reshape.shape)
    text = f"{what} '{tensor.name}': reshape {written(shape)} of dims {written(dims)}"
    if any(dim < -1 or dim == 0 for dim in shape):
        yield f"{text}: expected 1 or more, or -1 for any"
    elif dims.count(-1) != shape.count(-1):
        yield f"{text}: expected as many -1 in both"
    elif [math.prod(part) for part in _between(dims)] != [math.prod(part) for part in _between(shape)]:
        yield f"{text}: expected the same number of elements, also between the -1"


def _between(dims: Sequence[int]) -> Iterator[list[int]]:
    part: list[int] = []
    for dim in dims:
        if dim == -1:
            yield part
            part = []
        else:
            part.append(dim)
    yield part


@dataclass(frozen=True)
class Reshape:
    """From one shape to another, for the dimensions after the batch's."""

    given: tuple[int, ...]
    made: tuple[int, ...]
    skip: int
    """Dimensions at the front that stay as they are: 1 with a batch, else 0."""

    def __call__(self, name: str, array: Tensor) -> Tensor:
        """The same elements, another shape. Raises ModelFailed when `array` is not of the given shape."""
        shape = array.shape[self.skip :]
        if len(array.shape) < self.skip or not fits(shape, self.given):
            raise ModelFailed(f"'{name}' has shape {written(array.shape)}, reshape expects {written(self.given)}")
        free = iter([size for size, dim in zip(shape, self.given, strict=True) if dim == -1])
        return array.reshape((*array.shape[: self.skip], *(next(free) if dim == -1 else dim for dim in self.made)))


@dataclass(frozen=True)
class Reshapes:
    """The reshapes of a model, by the names of its inputs and outputs."""

    inputs: Mapping[str, Reshape]
    outputs: Mapping[str, Reshape]

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)


def reshapes_of(config: Mapping[str, Any]) -> Reshapes:
    """Return the reshapes of a configuration in its JSON form (`config_json`), in which `wrong` has found nothing."""
    skip = 1 if config["max_batch_size"] else 0
    inputs, outputs = (
        {
            tensor["name"]: (tuple(tensor["dims"]), tuple(tensor["reshape"]["shape"]))
            for tensor in config[role]
            if "reshape" in tensor
        }
        for role in ("input", "output")
    )
    return Reshapes(
        {name: Reshape(dims, shape, skip) for name, (dims, shape) in inputs.items()},
        {name: Reshape(shape, dims, skip) for name, (dims, shape) in outputs.items()},
    )


class ReshapedSession(Session):
    """A session whose inputs and outputs have the shapes of the configuration. Closing it closes the other."""

    reshapes = True

    def __init__(self, session: Session, reshapes: Reshapes) -> None:
        """Raises FailedPrecondition when the model has other shapes."""
        self._session = session
        self._inputs, self._outputs = reshapes.inputs, reshapes.outputs
        self.inputs = tuple(_seen(spec, self._inputs.get(spec.name), is_input=True) for spec in session.inputs)
        self.outputs = tuple(_seen(spec, self._outputs.get(spec.name), is_input=False) for spec in session.outputs)
        self.optional_inputs = tuple(
            _seen(spec, self._inputs.get(spec.name), is_input=True) for spec in session.optional_inputs
        )
        self.text, self.gpus, self.only_computes = session.text, session.gpus, session.only_computes
        self._parts = [self if part is session else ReshapedSession(part, reshapes) for part in session.parts()]

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        given = {name: self._reshaped(self._inputs, name, array) for name, array in inputs.items()}
        results = self._session.run(given, outputs)
        return [self._reshaped(self._outputs, name, array) for name, array in zip(outputs, results, strict=True)]

    @staticmethod
    def _reshaped(reshapes: Mapping[str, Reshape], name: str, array: Tensor) -> Tensor:
        return reshapes[name](name, array) if name in reshapes else array

    def parts(self) -> Sequence[Session]:
        return self._parts

    def close(self) -> None:
        self._session.close()


def _seen(spec: TensorSpec, reshape: Reshape | None, *, is_input: bool) -> TensorSpec:
    """The tensor as clients see it. Raises FailedPrecondition when the model's own shape is not the reshape's."""
    if reshape is None:
        return spec
    front, inner = spec.shape[: reshape.skip], spec.shape[reshape.skip :]
    clients, models = (reshape.given, reshape.made) if is_input else (reshape.made, reshape.given)
    # The runtime says () of a scalar, and of a tensor of which the file says nothing: then the configuration does.
    if spec.shape and not fits(models, inner):
        batch = " after the batch dimension" if reshape.skip else ""
        raise FailedPrecondition(
            f"{'input' if is_input else 'output'} '{spec.name}': reshape says {written(models)}{batch}, "
            f"the model {written(spec.shape)}"
        )
    return replace(spec, shape=(*(front or (-1,) * reshape.skip), *clients))
