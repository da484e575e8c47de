"""Models as the servers have them: what they take and give, and how much they have done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.inference.v2 import inference_pb2 as oip


@dataclass(frozen=True)
class TensorMetadata:
    """One input or output."""

    name: str
    datatype: str
    """BOOL, UINT8 ... INT64, FP16, BF16, FP32, FP64 or BYTES."""
    shape: tuple[int, ...]
    """-1 where a dimension varies; the batch dimension is included."""


@dataclass(frozen=True)
class ModelMetadata:
    """A model's versions, inputs and outputs."""

    name: str
    versions: tuple[str, ...]
    """Those that are ready, ascending."""
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Duration:
    """How often something happened, and how long that took in all."""

    count: int
    ns: int


@dataclass(frozen=True)
class ModelStatistics:
    """What one instance has done with one version of a model since it was loaded there."""

    name: str
    version: str
    last_inference_ms: int
    """Milliseconds since 1970; 0: there was none."""
    inference_count: int
    """Rows answered."""
    execution_count: int
    """Times the model ran."""
    success: Duration
    fail: Duration
    queue: Duration
    compute: Duration
    batches: Mapping[int, Duration]
    """Executions by rows that were executed together."""


@dataclass(frozen=True)
class IndexEntry:
    """A model version in the repository of one instance."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str
    """Why, when it is UNAVAILABLE."""


def of_metadata(message: oip.ModelMetadataResponse) -> ModelMetadata:
    """The value of the message."""
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
        properties=dict(message.properties),
    )


def of_statistics(message: oip.ModelStatistics) -> ModelStatistics:
    """The value of the message."""
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
