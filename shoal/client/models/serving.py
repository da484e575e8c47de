"""Models as the inference servers report them: inputs, outputs and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.inference.v2 import inference_pb2 as oip


@dataclass(frozen=True)
class TensorMetadata:
    """Name, datatype and shape of one input or output."""

    name: str
    datatype: str
    """BOOL, UINT8 ... INT64, FP16, BF16, FP32, FP64 or BYTES."""
    shape: tuple[int, ...]
    """Sizes, with the batch dimension; -1 for a variable size."""


@dataclass(frozen=True)
class ModelMetadata:
    """Versions, inputs and outputs of a model."""

    name: str
    versions: tuple[str, ...]
    """Versions that are ready, ascending."""
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Duration:
    """Number of events and their total duration."""

    count: int
    ns: int


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of one version of a model, since it was loaded; at a gateway summed over the node's instances."""

    name: str
    version: str
    last_inference_ms: int
    """Milliseconds since 1970; 0 before the first inference."""
    inference_count: int
    """Number of rows that were run."""
    execution_count: int
    """Number of executions of the model."""
    success: Duration
    fail: Duration
    queue: Duration
    compute: Duration
    batches: Mapping[int, Duration]
    """Executions by the number of rows in the execution."""


@dataclass(frozen=True)
class IndexEntry:
    """A model version in the repository of one instance."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str
    """Reason of the state UNAVAILABLE."""


def of_metadata(message: oip.ModelMetadataResponse) -> ModelMetadata:
    """Return the ModelMetadata of a message."""
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
        properties=dict(message.properties),
    )


def of_statistics(message: oip.ModelStatistics) -> ModelStatistics:
    """Return the ModelStatistics of a message."""
    stats = message.inference_stats
    return ModelStatistics(
        name=message.name,
        version=message.version,
        last_inference_ms=message.last_inference,
        inference_count=message.inference_count,
        execution_count=message.execution_count,
        success=_duration(stats.success),
        fail=_duration(stats.fail),
        queue=_duration(stats.queue),
        compute=_duration(stats.compute_infer),
        batches={batch.batch_size: _duration(batch.compute_infer) for batch in message.batch_stats},
    )


def _duration(message: oip.StatisticDuration) -> Duration:
    return Duration(message.count, message.ns)
