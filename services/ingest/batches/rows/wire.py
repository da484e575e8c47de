"""Conversion of stacks to requests of the inference protocol, and of responses to arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.ingest.batches.rows.fitting import FittedInput
from services.ingest.batches.rows.signature import Signature, TensorSpec
from services.ingest.batches.rows.stacking import Stack
from shoal.errors import DataLoss
from shoal.inference.v2 import inference_pb2 as oip
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import Array, read_tensor, to_raw


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """Model, tenant and caller that all requests of a batch share."""

    model_name: str
    model_version: str
    signature: Signature
    tenant: str = ""
    caller: bytes = b""
    """The caller in whose limits the rows count; empty without a policy."""


def request_of(asked: ModelTarget, inputs: Sequence[FittedInput], stack: Stack) -> bytes:
    """Return a stack as a serialised ModelInferRequest."""
    message = oip.ModelInferRequest(model_name=asked.model_name, model_version=asked.model_version)
    for fitted in inputs:
        array = fitted.stacked(stack.rows)
        if asked.signature.max_rows == 0:
            # Not array[0], which returns a scalar for an array of one element.
            array = array.reshape(array.shape[1:])
        message.inputs.add(name=fitted.spec.name, datatype=fitted.spec.datatype, shape=array.shape)
        message.raw_input_contents.append(to_raw(array, BY_NAME[fitted.spec.datatype]))
    for output in asked.signature.outputs:
        message.outputs.add(name=output.name)
    return message.SerializeToString()


def outputs_of(signature: Signature, response: oip.ModelInferResponse, rows: int) -> Mapping[str, Array]:
    """Return the outputs of a response to `rows` rows: arrays whose first dimension is the rows.

    Raises:
        DataLoss: the response contradicts the model's signature.
    """
    found = {tensor.name: index for index, tensor in enumerate(response.outputs)}
    arrays: dict[str, Array] = {}
    for spec in signature.outputs:
        if (index := found.get(spec.name)) is None:
            raise DataLoss(f"the model responded without its output {spec.name!r}")
        if (datatype := response.outputs[index].datatype) != spec.datatype:
            raise DataLoss(f"output {spec.name!r}: expected {spec.datatype}, the model responded with {datatype}")
        _, array = read_tensor(response.outputs, response.raw_output_contents, index, "output", DataLoss)
        arrays[spec.name] = _checked(spec, array if signature.max_rows else array[np.newaxis], rows)
    return arrays


def _checked(spec: TensorSpec, array: Array, rows: int) -> Array:
    if array.ndim != len(spec.shape) + 1 or len(array) != rows:
        raise DataLoss(
            f"output {spec.name!r}: the model promises the shape {list(spec.shape)} for a row, and responded with "
            f"{list(array.shape)} to {rows} rows"
        )
    return array
