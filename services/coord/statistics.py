"""Sum of the statistics of a cluster's inference servers: ModelStatistics of the Open Inference Protocol. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shoal.inference.v2 import inference_pb2 as pb


def merged(responses: Iterable[pb.ModelStatisticsResponse]) -> pb.ModelStatisticsResponse:
    """Return the statistics of each model version over all responses, sorted by name and version.

    Counts and durations are summed; batch statistics by batch size, memory by type and device, statistics of responses
    by key. `last_inference` is the latest.
    """
    found: dict[tuple[str, str], pb.ModelStatistics] = {}
    for response in responses:
        for stats in response.model_stats:
            total = found.setdefault((stats.name, stats.version), stats)
            if total is not stats:
                _add_model(total, stats)
    ordered = sorted(found.values(), key=lambda stats: (stats.name, len(stats.version), stats.version))
    return pb.ModelStatisticsResponse(model_stats=ordered)


def _add_model(total: pb.ModelStatistics, stats: pb.ModelStatistics) -> None:
    total.last_inference = max(total.last_inference, stats.last_inference)
    total.inference_count += stats.inference_count
    total.execution_count += stats.execution_count
    _add(total.inference_stats, stats.inference_stats)
    _add(total.scheduling, stats.scheduling)
    sizes = {batch.batch_size: batch for batch in total.batch_stats}
    for batch in stats.batch_stats:
        size = batch.batch_size
        if size in sizes:
            _add(sizes[size], batch)
            sizes[size].batch_size = size
        else:
            total.batch_stats.add().CopyFrom(batch)
    total.batch_stats.sort(key=lambda batch: batch.batch_size)
    usages = {(usage.type, usage.id): usage for usage in total.memory_usage}
    for usage in stats.memory_usage:
        if known := usages.get((usage.type, usage.id)):
            known.byte_size += usage.byte_size
        else:
            total.memory_usage.add().CopyFrom(usage)
    for key, responses in stats.response_stats.items():
        _add(total.response_stats[key], responses)


def _add(total: Message, other: Message) -> None:
    """Add the numbers of a message whose fields are numbers, and messages of numbers."""
    field: FieldDescriptor
    value: Any
    for field, value in other.ListFields():
        if field.message_type is not None:
            _add(getattr(total, field.name), value)
        else:
            setattr(total, field.name, getattr(total, field.name) + value)
