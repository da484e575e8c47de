"""Messages as JSON, in steps that leave the event loop time."""

from __future__ import annotations

import orjson

from mesh.rest.plain_json import as_json, list_json
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.tensors import completed


def test_a_list_of_messages_is_the_same_in_steps_and_a_long_list_in_one_takes_many():
    few = pb.ModelStatistics(name="few", memory_usage=[pb.MemoryUsage(type="GPU", id=1, byte_size=1 << 60)])
    many = pb.ModelStatistics(name="many", batch_stats=[pb.InferBatchStatistics(batch_size=n) for n in range(4_096)])
    assert sum(1 for _ in list_json("model_stats", [few, many])) > 100
    found = completed(list_json("model_stats", [few, many]))
    assert orjson.loads(found) == as_json(pb.ModelStatisticsResponse(model_stats=[few, many]))
