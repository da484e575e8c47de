"""ModelStatistics: counters add up, by call, row and execution; on an instance that nobody else asks."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.infer import onnx_files
from tests.infer.conformance import wire
from tests.infer.conformance.instance import Instance
from tests.infer.conformance.wire import floats, request


@pytest.fixture(scope="module")
def alone(front: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GRPCInferenceServiceStub]:
    """An instance for two tests, which ask different models."""
    folder = tmp_path_factory.mktemp("statistics")
    for name, versions in {"double": (1,), "versions": (1, 2)}.items():
        for version in versions:
            place = folder / "models" / name / str(version)
            place.mkdir(parents=True)
            (place / "model.onnx").write_bytes(onnx_files.scale(2).SerializeToString())
    (folder / "models/versions/config.pbtxt").write_text("version_policy { all {} }")
    with Instance.serving(folder / "models", folder / "serve.log", front=front) as running:
        with grpc.insecure_channel(running.address, options=wire.OPTIONS) as channel:
            yield GRPCInferenceServiceStub(channel)


def rows(stub, name: str = "", version: str = "") -> list[pb.ModelStatistics]:
    return list(stub.ModelStatistics(pb.ModelStatisticsRequest(name=name, version=version)).model_stats)


def test_counters(alone):
    (before,) = rows(alone, "double")
    assert (before.name, before.version, before.inference_count, before.execution_count) == ("double", "1", 0, 0)
    assert before.last_inference == 0
    for count in (1, 3, 3):
        alone.ModelInfer(request("double", floats(rows=count)))
    for wrong in (request("double", floats("z")), request("double", floats(), parameters={"timeout": "x"})):
        with pytest.raises(grpc.RpcError):
            alone.ModelInfer(wrong)
    (after,) = rows(alone, "double", "1")
    stats = after.inference_stats
    # Nothing ran at the same time: each call was an execution of its own.
    assert (after.inference_count, after.execution_count) == (7, 3)
    assert after.last_inference > 0
    assert (stats.success.count, stats.fail.count) == (3, 2)
    assert (
        stats.queue.count == stats.compute_input.count == stats.compute_infer.count == stats.compute_output.count == 3
    )
    assert 0 < stats.compute_infer.ns <= stats.success.ns
    assert stats.success.ns >= stats.queue.ns
    by_size = {batch.batch_size: batch for batch in after.batch_stats}
    assert {size: batch.compute_infer.count for size, batch in by_size.items()} == {1: 1, 3: 2}
    assert sum(batch.compute_infer.ns for batch in by_size.values()) == stats.compute_infer.ns


def test_which_models_and_versions(alone):
    assert [(row.name, row.version) for row in rows(alone)] == [("double", "1"), ("versions", "1"), ("versions", "2")]
    assert [(row.name, row.version) for row in rows(alone, "versions")] == [("versions", "1"), ("versions", "2")]
    assert [(row.name, row.version) for row in rows(alone, "versions", "2")] == [("versions", "2")]
    alone.ModelInfer(request("versions", floats(), version="1"))
    assert [row.inference_count for row in rows(alone, "versions")] == [1, 0]


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("nope", "", "requested model 'nope' is not available"),
        ("nope", "1", "requested model 'nope' version 1 is not available"),
        ("double", "7", "requested model 'double' version 7 is not available"),
        ("double", "abc", "failed to get model version from specified version string 'abc'"),
    ],
)
def test_of_what_is_not_there(stub, name, version, says):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelStatistics(pb.ModelStatisticsRequest(name=name, version=version))
    code, message = wire.status(caught.value)
    assert (code, message.startswith(says)) == ("INVALID_ARGUMENT", True), message
