"""Requests and results of inference, and their conversion to and from the inference protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from shoal.client.inference.arrays import ArrayLike, is_exact, to_tensor
from shoal.errors import DataLoss, InvalidArgument, ShoalError
from shoal.inference.v2 import inference_pb2 as oip
from shoal.oip.tensors import Array, read_tensor

Parameter: TypeAlias = bool | int | float | str
"""Type of the values in the protocol's `parameters`."""

_Tensors: TypeAlias = (
    Sequence[oip.ModelInferRequest.InferInputTensor] | Sequence[oip.ModelInferResponse.InferOutputTensor]
)
_INT64 = 1 << 63
_UINT64 = 1 << 64


@dataclass(frozen=True)
class InferRequest:
    """One request to a model. Arrays keep their datatype; lists and scalars take the one of the model's metadata."""

    model: str
    inputs: Mapping[str, ArrayLike]
    outputs: Sequence[str] | None = None
    """Outputs to return; None returns all."""
    version: int | str = ""
    """Empty: the server's choice, which is the alias `stable`, else the newest version."""
    parameters: Mapping[str, Parameter] | None = None
    request_id: str = ""
    """Returned with the response."""
    datatypes: Mapping[str, str] = field(default_factory=dict)
    """Datatypes to send, by input name: `{"x": "BF16"}`."""

    @property
    def inexact(self) -> list[str]:
        """Names of the inputs whose datatype only the model's metadata has."""
        return [name for name, value in self.inputs.items() if name not in self.datatypes and not is_exact(value)]


@dataclass(frozen=True)
class InferResult:
    """Outputs of one inference. `result["name"]` is the output of that name."""

    model_name: str
    model_version: str
    """The version that ran."""
    outputs: dict[str, Array] = field(default_factory=dict)
    """Writable arrays by output name. BYTES: object arrays of `bytes`. BF16: the bits as uint16 (see BFloat16)."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    """With the parameter `explain` in the request: `replica`, `batch_size`, `queue_us`, `compute_us` and others
    (docs/requests.md)."""
    id: str = ""
    datatypes: dict[str, str] = field(default_factory=dict)
    """Protocol datatype of each output."""
    error: ShoalError | None = None
    """Set on streams only: the error of this request, which then has no outputs."""

    def __getitem__(self, name: str) -> Array:
        if self.error is not None:
            raise self.error
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(f"no output {name!r}: the outputs are {', '.join(self.outputs) or 'none'}") from None


def check_types(request: InferRequest) -> None:
    """Check the containers of `request`, which users get wrong where no type checker runs. Raises InvalidArgument."""
    containers: dict[str, object] = {
        "inputs": request.inputs,
        "parameters": {} if request.parameters is None else request.parameters,
        "datatypes": request.datatypes,
    }
    for argument, value in containers.items():
        if not isinstance(value, Mapping):
            example = '{"x": array}' if argument == "inputs" else '{"x": value}'
            raise InvalidArgument(f"{argument}: expected a mapping, such as {example}, got {type(value).__name__}")
    if isinstance(request.outputs, str):
        raise InvalidArgument(f"outputs: expected a list of names, such as [{request.outputs!r}], got text")


def to_request(request: InferRequest, metadata: Mapping[str, str] | None = None) -> oip.ModelInferRequest:
    """Return the message of `request`; `metadata` has the model's datatypes by input name.

    Raises:
        InvalidArgument: the message names the input or parameter that cannot be sent.
    """
    if not request.model:
        raise InvalidArgument("no model: set the name of a model")
    try:
        return _to_request(request, metadata or {})
    except (TypeError, ValueError) as err:
        # A name, id or version of a wrong type, or text that UTF-8 cannot carry.
        raise InvalidArgument(f"infer with {request.model}: {err}") from err


def _to_request(request: InferRequest, metadata: Mapping[str, str]) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name=request.model, model_version=str(request.version), id=request.request_id)
    for name, value in request.inputs.items():
        datatype = request.datatypes.get(name) or (None if is_exact(value) else metadata.get(name))
        tensor = to_tensor(name, value, datatype)
        message.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.raw)
    for output in request.outputs or ():
        message.outputs.add(name=output)
    for key, parameter in (request.parameters or {}).items():
        message.parameters[key].CopyFrom(to_parameter(key, parameter))
    return message


def to_parameter(key: str, value: Parameter) -> oip.InferParameter:
    """Return the message of a parameter. Raises InvalidArgument when the protocol has no type for `value`."""
    if isinstance(value, bool):
        return oip.InferParameter(bool_param=value)
    if isinstance(value, int):
        if -_INT64 <= value < _INT64:
            return oip.InferParameter(int64_param=value)
        if 0 <= value < _UINT64:
            return oip.InferParameter(uint64_param=value)
        raise InvalidArgument(f"parameter {key!r}: {value} does not fit 64 bits")
    if isinstance(value, float):
        return oip.InferParameter(double_param=value)
    if isinstance(value, str):
        return oip.InferParameter(string_param=value)
    raise InvalidArgument(f"parameter {key!r}: expected bool, int, float or str, got {type(value).__name__}")


def of_response(response: oip.ModelInferResponse) -> InferResult:
    """Return the result in `response`.

    Raises:
        DataLoss: the tensors' contents do not fit their shape or datatype.
    """
    return InferResult(
        model_name=response.model_name,
        model_version=response.model_version,
        outputs=_arrays(response.outputs, response.raw_output_contents, "output"),
        parameters=of_parameters(response.parameters),
        id=response.id,
        datatypes={output.name: output.datatype for output in response.outputs},
    )


def of_inputs(request: oip.ModelInferRequest) -> dict[str, Array]:
    """Return the inputs of `request` by name.

    Raises:
        DataLoss: the tensors' contents do not fit their shape or datatype.
    """
    return _arrays(request.inputs, request.raw_input_contents, "input")


def _arrays(tensors: _Tensors, raw: Sequence[bytes], role: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for index in range(len(tensors)):
        name, array = read_tensor(tensors, raw, index, role, DataLoss)
        # A view of the message is read-only, and keeps the whole message in memory.
        arrays[name] = array if array.flags.writeable else array.copy()
    return arrays


def of_parameters(parameters: Mapping[str, oip.InferParameter]) -> dict[str, Parameter]:
    """Return the values of a message's parameters, ordered by name; parameters without a value are left out."""
    values: dict[str, Parameter] = {}
    for key, parameter in sorted(parameters.items()):
        which = parameter.WhichOneof("parameter_choice")
        if which is not None:
            values[key] = getattr(parameter, which)
    return values
