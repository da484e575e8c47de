"""Signature of a model: its inputs and outputs for one row, read from its metadata when the batch is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.inference.v2 import inference_pb2, model_config_pb2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Input or output of a model, for one row."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Shape without the batch dimension; -1 where a dimension varies."""
    is_optional: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.datatype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a model when the batch was submitted."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_rows: int
    """Maximum rows of one request; 0: a request is one row, without batch dimension."""

    @property
    def takes(self) -> str:
        """The inputs as text, for error messages."""
        return "; ".join(map(str, self.inputs)) or "nothing"


def signature_of(
    metadata: inference_pb2.ModelMetadataResponse, config: model_config_pb2.ModelConfig, outputs: Sequence[str]
) -> Signature:
    """Return the signature of a model, with the requested `outputs` (empty: all).

    Raises:
        FailedPrecondition: batches do not support this model. InvalidArgument: the model has no such output.
    """
    if config.model_transaction_policy.decoupled:
        raise FailedPrecondition(f"model {metadata.name!r} is decoupled: it may send any number of responses to a row")
    if config.HasField("sequence_batching"):
        raise FailedPrecondition(f"model {metadata.name!r} is stateful: rows of a batch are not a sequence")
    skipped = 1 if config.max_batch_size > 0 else 0
    optional = {tensor.name for tensor in config.input if tensor.optional}
    known = [tensor.name for tensor in metadata.outputs]
    for name in outputs:
        if name not in known:
            raise InvalidArgument(f"outputs: model {metadata.name!r} has no output {name!r}: it gives {known}")
    return Signature(
        tuple(TensorSpec(t.name, t.datatype, tuple(t.shape[skipped:]), t.name in optional) for t in metadata.inputs),
        tuple(
            TensorSpec(t.name, t.datatype, tuple(t.shape[skipped:]))
            for t in metadata.outputs
            if not outputs or t.name in outputs
        ),
        max(config.max_batch_size, 0),
    )
