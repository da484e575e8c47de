"""Reshape of inputs and outputs (`reshape` in a configuration): a model's shape may differ from the clients' shape.

    clients: dims [4]  ──>  model: reshape [2, 2]          with a batch: [n, 4] ──> [n, 2, 2]
    clients: dims [1]  ──>  model: reshape [], a scalar    with a batch: [n, 1] ──> [n]

The n-th -1 of `dims` becomes the n-th -1 of `reshape`. Loading wraps the session of a model with reshape, so models
without reshape have no overhead. Model processes import this module, which therefore imports no protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import FailedPrecondition
from shoal.oip.tensors import shape_text

if TYPE_CHECKING:
    from shoal.inference.v2 import model_config_pb2 as pb


def reshape_errors(role: str, tensor: pb.ModelInput | pb.ModelOutput) -> Iterator[str]:
    """Yield the errors in the reshape of `tensor`; `role` is `input` or `output`."""
    if not tensor.HasField("reshape"):
        return
    dims, shape = list(tensor.dims), list(tensor.reshape.shape)
    text = f"{role} '{tensor.name}': reshape {shape_text(shape)} of dims {shape_text(dims)}"
    if any(dim < -1 or dim == 0 for dim in shape):
        yield f"{text}: expected 1 or more, or -1 for any"
    elif dims.count(-1) != shape.count(-1):
        yield f"{text}: expected as many -1 in both"
    elif [math.prod(run) for run in _fixed_runs(dims)] != [math.prod(run) for run in _fixed_runs(shape)]:
        yield f"{text}: expected the same number of elements, also between the -1"


def _fixed_runs(dims: Sequence[int]) -> Iterator[list[int]]:
    """Yield the runs of fixed dimensions before, between and after the -1."""
    run: list[int] = []
    for dim in dims:
        if dim == -1:
            yield run
            run = []
        else:
            run.append(dim)
    yield run


@dataclass(frozen=True)
class Reshape:
    """Change of shape from `source` to `target`, for the dimensions after the batch dimension."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    skip: int
    """Leading dimensions that do not change: 1 with a batch dimension, else 0."""

    def __call__(self, name: str, array: Tensor) -> Tensor:
        """Return `array` with the target shape. Raises ModelFailed when `array` does not have the source shape."""
        shape = array.shape[self.skip :]
        if len(array.shape) < self.skip or not fits(shape, self.source):
            raise ModelFailed(
                f"'{name}' has shape {shape_text(array.shape)}, reshape expects {shape_text(self.source)}"
            )
        free = iter([size for size, dim in zip(shape, self.source, strict=True) if dim == -1])
        return array.reshape((*array.shape[: self.skip], *(next(free) if dim == -1 else dim for dim in self.target)))


@dataclass(frozen=True)
class Reshapes:
    """The reshapes of a model, by the names of its inputs and outputs."""

    inputs: Mapping[str, Reshape]
    outputs: Mapping[str, Reshape]

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)


def reshapes_of(config: Mapping[str, Any]) -> Reshapes:
    """Return the reshapes of a configuration in its JSON form (`config_json`), which `reshape_errors` has checked."""
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
    """Session that gives the inputs and outputs of `session` the shapes of the configuration. Owns `session`."""

    reshapes = True

    def __init__(self, session: Session, reshapes: Reshapes) -> None:
        """Wrap `session`. Raises FailedPrecondition when the model's shapes do not match the reshapes."""
        self._session = session
        self._inputs, self._outputs = reshapes.inputs, reshapes.outputs
        self.inputs = tuple(_seen(spec, self._inputs.get(spec.name), is_input=True) for spec in session.inputs)
        self.outputs = tuple(_seen(spec, self._outputs.get(spec.name), is_input=False) for spec in session.outputs)
        self.optional_inputs = tuple(
            _seen(spec, self._inputs.get(spec.name), is_input=True) for spec in session.optional_inputs
        )
        self.text, self.gpus, self.only_computes = session.text, session.gpus, session.only_computes
        self.may_not_end = session.may_not_end
        self._device_sessions = [
            self if each is session else ReshapedSession(each, reshapes) for each in session.device_sessions()
        ]

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        return self._results(self._session.run(self._reshaped_all(inputs), outputs), outputs)

    def run_until(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], given_up: GivenUp) -> list[Tensor]:
        return self._results(self._session.run_until(self._reshaped_all(inputs), outputs, given_up), outputs)

    def _reshaped_all(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._reshaped(self._inputs, name, array) for name, array in inputs.items()}

    def _results(self, results: Sequence[Tensor], outputs: Sequence[str]) -> list[Tensor]:
        return [self._reshaped(self._outputs, name, array) for name, array in zip(outputs, results, strict=True)]

    @staticmethod
    def _reshaped(reshapes: Mapping[str, Reshape], name: str, array: Tensor) -> Tensor:
        return reshapes[name](name, array) if name in reshapes else array

    def device_sessions(self) -> Sequence[Session]:
        return self._device_sessions

    def interrupt(self) -> None:
        self._session.interrupt()

    def shrink(self) -> None:
        self._session.shrink()

    def close(self) -> None:
        self._session.close()


def _seen(spec: TensorSpec, reshape: Reshape | None, *, is_input: bool) -> TensorSpec:
    """Return the tensor's spec with the clients' shape.

    Raises:
        FailedPrecondition: the model's own shape does not match the reshape.
    """
    if reshape is None:
        return spec
    front, inner = spec.shape[: reshape.skip], spec.shape[reshape.skip :]
    client_shape, model_shape = (reshape.source, reshape.target) if is_input else (reshape.target, reshape.source)
    # A shape of () is a scalar, or a tensor without a shape in the file: then the configuration's shape is used.
    if spec.shape and not fits(model_shape, inner):
        batch = " after the batch dimension" if reshape.skip else ""
        raise FailedPrecondition(
            f"{'input' if is_input else 'output'} '{spec.name}': reshape says {shape_text(model_shape)}{batch}, "
            f"the model {shape_text(spec.shape)}"
        )
    return replace(spec, shape=(*(front or (-1,) * reshape.skip), *client_shape))
