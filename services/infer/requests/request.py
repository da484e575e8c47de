"""Inference request: a message read against the model's signature, ready to run and to be stacked with others."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from mesh.rpc.call_context import RequestMemory
from mesh.rpc.heavy_work import Steps
from mesh.rpc.parsing import MAX_ELEMENTS
from services.infer.error_text import listed, quoted
from services.infer.requests import parameters, tensors
from services.infer.requests.parameters import Parameters
from services.infer.requests.ragged import Value, arrays
from services.infer.requests.request_memory import UNCOUNTED
from services.infer.requests.resident import is_resident
from services.infer.requests.signature import Signature, TensorSpec, fits
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.limits import MAX_DIMS, MAX_PARAMETERS, MAX_TENSORS
from shoal.oip.tensors import completed, count_elements, shape_text

if TYPE_CHECKING:
    # Model processes import this module, too, and do without OpenTelemetry.
    from opentelemetry.trace import SpanContext

# Beyond these, reading a request takes about a millisecond, and waits for its turns. Typed contents are copied, and
# BYTES become Python objects, one by one. Raw numbers of any size are views of the message.
_FEW_ELEMENTS = 1 << 13
_MANY_INPUTS = 256


@dataclass(frozen=True)
class WantedOutput:
    """One requested output."""

    spec: TensorSpec
    classes: int = 0
    """Number of best classes as text instead of the output itself; 0: the output itself."""
    stays: bool = False
    """True when the output may stay on its GPU as a `Resident`: only steps there use it."""


@dataclass(slots=True, eq=False)
class InferenceRequest:
    """One request that fits its model. Treated as immutable; not frozen, because that would triple its cost."""

    inputs: Mapping[str, Value]
    """Tensors; between the steps of an ensemble, a ragged input may be `Rows`."""
    outputs: tuple[WantedOutput, ...]
    rows: int
    """Size of the batch dimension; 1 for a model that has none."""
    size_bytes: int
    """Size of the inputs in a queue."""
    key: Hashable
    """Stack key: requests with equal keys can run as one. Inputs, row shapes (unless ragged) and outputs agree."""
    parameters: Parameters
    source: pb.ModelInferRequest | None = None
    """Message of the request, for models that use it; None on the fast path."""
    check: Callable[[str, InferenceRequest], Awaitable[InferenceRequest]] | None = None
    """Crash guard of a retry: an ensemble checks the request of each step, by its model's name."""
    memory: RequestMemory = UNCOUNTED
    """Memory of the request's call, for tensors and responses that are made before the end."""
    trace: SpanContext | None = None
    """Span of the request's call in a sampled trace."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The inputs of a model without ragged inputs."""
        return cast("Mapping[str, Tensor]", self.inputs)


class RunningRequest(Protocol):
    """A request in execution, with what the calls inherit that its model makes meanwhile."""

    @property
    def request(self) -> InferenceRequest: ...

    @property
    def deadline(self) -> float:
        """On the server's clock, in seconds; infinite without one."""

    @property
    def is_abandoned(self) -> bool: ...

    @property
    def tenant(self) -> str: ...


def check_counts(message: pb.ModelInferRequest) -> None:
    """Raise InvalidArgument for too many tensors or parameters: all other work on a message goes through them."""
    inputs, outputs, raw = len(message.inputs), len(message.outputs), len(message.raw_input_contents)
    for what, count, most in (
        ("inputs", inputs, MAX_TENSORS),
        ("outputs", outputs, MAX_TENSORS),
        ("raw_input_contents", raw, MAX_TENSORS),
        ("parameters", len(message.parameters), MAX_PARAMETERS),
    ):
        if count > most:
            raise InvalidArgument(
                f"{what}: a request for model '{message.model_name}' has {count}, at most {most} are accepted"
            )


def read(message: pb.ModelInferRequest, signature: Signature) -> InferenceRequest:
    """Return the request in `message`, for a model with this signature.

    Raises:
        InvalidArgument: names the tensor or parameter, what was expected and what was sent.
        Unimplemented: the message refers to shared memory.
    """
    return completed(read_steps(message, signature))


def read_steps(message: pb.ModelInferRequest, signature: Signature) -> Steps[InferenceRequest]:
    """Return the request as `read` does, in steps: each takes a few milliseconds at most."""
    model = message.model_name
    given = parameters.read(message.parameters)
    specs = []
    for tensor in message.inputs:
        specs.append(_spec(tensor, signature, model))
        yield
    _check_complete([spec.name for spec in specs], signature, model)
    rows = _rows(message.inputs, specs, signature.max_batch_size, model)
    _check_elements(message)
    data = yield from _data(message, specs, signature.text)
    inputs = dict(zip((spec.name for spec in specs), data, strict=True))
    outputs = _outputs(message.outputs, signature, model)
    size = sum(tensors.size_bytes(t) for t in data)
    key = key_of(inputs, outputs, signature)
    return InferenceRequest(inputs, outputs, rows, size, key, given, message)


def asked_rows(message: pb.ModelInferRequest, signature: Signature) -> int:
    """Return the rows of a message before it is read, by the shape of its first input; at most the model's limit."""
    if not signature.max_batch_size or not message.inputs or not message.inputs[0].shape:
        return 1
    return min(max(message.inputs[0].shape[0], 1), signature.max_batch_size)


def is_long_read(message: pb.ModelInferRequest) -> bool:
    """Return True when reading would block the event loop; decided from the shapes, which are cheap to read."""
    is_typed = not message.raw_input_contents
    return len(message.inputs) > _MANY_INPUTS or any(
        _elements(tensor) > _FEW_ELEMENTS for tensor in message.inputs if is_typed or tensor.datatype == "BYTES"
    )


def _elements(tensor: pb.ModelInferRequest.InferInputTensor) -> int:
    # More dimensions are rejected unread, and their product would be a number of any length.
    return math.prod(tensor.shape) if len(tensor.shape) <= MAX_DIMS else 0


def _check_elements(message: pb.ModelInferRequest) -> None:
    """Raise InvalidArgument for too many elements of BYTES: a runtime makes its strings of them without a pause."""
    if sum(_elements(tensor) for tensor in message.inputs if tensor.datatype == "BYTES") > MAX_ELEMENTS:
        raise InvalidArgument(
            f"inputs: a request for model '{message.model_name}' has more than {MAX_ELEMENTS} elements of BYTES: "
            "send fewer at a time"
        )


# Memory of an element of BYTES beside its characters: a Python object, and its place in an array.
_ELEMENT_BYTES = 56


def read_bytes(message: pb.ModelInferRequest, message_bytes: int) -> int:
    """Return the most memory that the tensors of a message of `message_bytes` take beside the message."""
    elements = sum(_elements(tensor) for tensor in message.inputs if tensor.datatype == "BYTES" and tensor.shape)
    # An element takes at least two bytes of the message: a tag and a length.
    return message_bytes + _ELEMENT_BYTES * max(min(elements, message_bytes // 2), 0)


def held_bytes(values: Sequence[Value]) -> int:
    """Return the memory of tensors."""
    size = 0
    for value in values:
        for array in arrays(value):
            size += tensors.data_bytes(array) + (_ELEMENT_BYTES * array.size if array.dtype == object else 0)
    return size


def key_of(inputs: Mapping[str, Value], outputs: Sequence[WantedOutput], signature: Signature) -> Hashable:
    """Return the stack key of a request. Ragged inputs of different shapes have equal keys."""
    skip = 1 if signature.max_batch_size else 0
    ragged = signature.ragged
    shapes = tuple(
        (
            name,
            None if name in ragged or isinstance(value, list) else value.shape[skip:],
            is_resident(value),
        )
        for name, value in sorted(inputs.items())
    )
    return shapes, tuple((output.spec.name, output.stays) for output in outputs)


def _spec(tensor: pb.ModelInferRequest.InferInputTensor, signature: Signature, model: str) -> TensorSpec:
    spec = signature.inputs_by_name.get(tensor.name)
    if spec is None:
        raise InvalidArgument(
            f"unexpected {_input(tensor.name, model)}: its inputs are {listed(signature.inputs_by_name)}"
        )
    if tensor.datatype != spec.datatype.name:
        raise InvalidArgument(
            f"{_input(spec.name, model)}: expected datatype {spec.datatype.name}, got {quoted(tensor.datatype)}"
        )
    if not fits(tensor.shape, spec.shape):
        raise InvalidArgument(
            f"{_input(spec.name, model)}: unexpected shape: expected {shape_text(spec.shape)}, "
            f"got {shape_text(tensor.shape)}"
        )
    if any(dim < 0 for dim in tensor.shape):
        raise InvalidArgument(f"{_input(spec.name, model)}: shape {shape_text(tensor.shape)} has a negative dimension")
    if tensor.parameters:
        parameters.check_input(tensor.parameters, _input(spec.name, model))
    return spec


def _check_complete(names: Sequence[str], signature: Signature, model: str) -> None:
    if missing := signature.required.difference(names):
        raise InvalidArgument(
            f"expected {len(signature.inputs)} inputs but got {len(names)} for model '{model}': "
            f"missing {listed(sorted(missing))}"
        )
    if len(names) > 1 and len(set(names)) < len(names):
        twice = next(name for name in signature.inputs_by_name if names.count(name) > 1)
        raise InvalidArgument(f"{_input(twice, model)} is given more than once")


def _rows(given: Sequence[Any], specs: Sequence[TensorSpec], max_rows: int, model: str) -> int:
    if not max_rows or not given:
        return 1
    rows = int(given[0].shape[0])
    for tensor, spec in zip(given, specs, strict=True):
        if tensor.shape[0] != rows:
            raise InvalidArgument(
                f"{_input(spec.name, model)}: expected {rows} rows as input '{specs[0].name}' has, "
                f"got {tensor.shape[0]}: all inputs of a request have one batch size"
            )
    if not 1 <= rows <= max_rows:
        raise InvalidArgument(
            f"{_input(specs[0].name, model)}: inference request batch-size must be <= {max_rows} and at least 1, "
            f"got {rows}"
        )
    return rows


def _data(message: pb.ModelInferRequest, specs: Sequence[TensorSpec], text: bool) -> Steps[list[Tensor]]:
    raw, model = message.raw_input_contents, message.model_name
    # Of a large request: typed contents that are views of its body.
    packed: Mapping[int, tuple[str, memoryview]] = getattr(message, "packed_contents", {})
    read: list[Tensor] = []
    if raw:
        for n, tensor in enumerate(message.inputs):
            if n in packed or (tensor.HasField("contents") and tensor.contents.ListFields()):
                raise InvalidArgument(
                    f"{_input(tensor.name, model)} has both contents and raw_input_contents: expected one of them"
                )
        if len(raw) != len(specs):
            raise InvalidArgument(
                f"expected {len(specs)} raw_input_contents, one for each input of model '{model}' "
                f"({listed(spec.name for spec in specs)}), got {len(raw)}"
            )
        for data, spec, tensor in zip(raw, specs, message.inputs, strict=True):
            what = _input(spec.name, model)
            read.append((yield from tensors.from_raw_steps(data, spec.datatype, tensor.shape, what, text=text)))
            yield
        return read
    for n, (tensor, spec) in enumerate(zip(message.inputs, specs, strict=True)):
        what = _input(spec.name, model)
        if n in packed:
            read.append(tensors.from_packed(*packed[n], spec.datatype, tensor.shape, what))
            yield
            continue
        if not tensor.contents.ListFields() and count_elements(tensor.shape, what, InvalidArgument):
            raise InvalidArgument(f"{what} has no data: expected contents, or an entry of raw_input_contents")
        steps = tensors.from_contents_steps(tensor.contents, spec.datatype, tensor.shape, what, text=text)
        read.append((yield from steps))
    return read


def _outputs(requested: Sequence[Any], signature: Signature, model: str) -> tuple[WantedOutput, ...]:
    if not requested:
        return tuple(WantedOutput(spec) for spec in signature.outputs)
    outputs: dict[str, WantedOutput] = {}
    for output in requested:
        what = f"inference output {quoted(output.name)} for model '{model}'"
        spec = signature.outputs_by_name.get(output.name)
        if spec is None:
            raise InvalidArgument(f"unexpected {what}: its outputs are {listed(signature.outputs_by_name)}")
        if output.name in outputs:
            raise InvalidArgument(f"{what} is requested more than once")
        classes = parameters.classes(output.parameters, what)
        if classes and spec.datatype.is_bytes:
            raise InvalidArgument(f"{what}: parameter 'classification': expected an output of numbers, it is BYTES")
        outputs[output.name] = WantedOutput(spec, classes)
    return tuple(outputs.values())


def _input(name: str, model: str) -> str:
    return f"inference input {quoted(name)} for model '{model}'"
