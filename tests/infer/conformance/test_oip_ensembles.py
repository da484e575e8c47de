"""Ensembles are models to a client: every call, the first time and when the server knows the request."""

from __future__ import annotations

import numpy as np

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, floats, request


def test_it_responds_again_and_again(infer):
    for start in range(1, 5):
        x = np.arange(8, dtype=np.float32).reshape(2, 4) + np.float32(start)
        response = infer("chain", floats(rows=2, start=start), id=str(start))
        assert np.array_equal(wire.array(response, "y"), 4 * x)
        assert (response.model_name, response.model_version, response.id) == ("chain", "1", str(start))


def test_what_it_is(stub):
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="chain"))
    assert (metadata.platform, list(metadata.versions)) == ("ensemble", ["1"])
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 4])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("y", "FP32", [-1, 4])]
    config = stub.ModelConfig(pb.ModelConfigRequest(name="chain")).config
    assert (config.max_batch_size, len(config.ensemble_scheduling.step)) == (8, 2)
    assert stub.ModelReady(pb.ModelReadyRequest(name="chain")).ready
    (row,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="chain")).model_stats
    assert row.name == "chain"


def test_what_does_not_fit_is_named(refused):
    assert "input 'z' for model 'chain'" in refused("INVALID_ARGUMENT", request("chain", floats("z")))
    assert "batch-size must be <= 8" in refused("INVALID_ARGUMENT", request("chain", floats(rows=9)))
    wrong = request("chain", Given("x", "FP32", (1, 3), b"\0" * 12))
    assert "expected [-1,4], got [1,3]" in refused("INVALID_ARGUMENT", wrong)
    assert "'twice' for model 'chain'" in refused("INVALID_ARGUMENT", request("chain", floats(), outputs=["twice"]))


def test_explain(infer):
    said = infer("chain", floats(), parameters={"explain": True}).parameters
    assert [said[f"step_{n}_model"].string_param for n in (0, 1)] == ["double", "double"]
    assert all(said[f"step_{n}_batch_size"].int64_param >= 1 for n in (0, 1))
