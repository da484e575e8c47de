"""What the server says of its models: metadata, configuration, index."""

from __future__ import annotations

import grpc
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2 as config_pb2
from tests.infer.conformance import served_models, wire


def refused(call, request) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=wire.PATIENCE_S)
    return wire.status(caught.value)


@pytest.mark.parametrize("datatype", wire.DATATYPES)
def test_metadata_names_every_datatype(stub, datatype):
    name = f"same_{datatype.lower()}"
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=name))
    assert (metadata.name, list(metadata.versions)) == (name, ["1"])
    for tensors, tensor_name in ((metadata.inputs, "x"), (metadata.outputs, "y")):
        (tensor,) = tensors
        assert (tensor.name, tensor.datatype, list(tensor.shape)) == (tensor_name, datatype, [-1, -1])


def test_metadata_has_the_batch_dimension_and_every_version(stub):
    double = stub.ModelMetadata(pb.ModelMetadataRequest(name="double"))
    assert double.platform == "onnxruntime_onnx"
    assert [list(tensor.shape) for tensor in (*double.inputs, *double.outputs)] == [[-1, 4], [-1, 4]]
    flat = stub.ModelMetadata(pb.ModelMetadataRequest(name="flat", version="1"))
    assert list(flat.inputs[0].shape) == [2, 3]
    add = stub.ModelMetadata(pb.ModelMetadataRequest(name="add"))
    assert [tensor.name for tensor in add.inputs] == ["a", "b"]
    assert [tensor.name for tensor in add.outputs] == ["sum", "difference"]
    assert list(stub.ModelMetadata(pb.ModelMetadataRequest(name="versions")).versions) == ["1", "2", "3"]


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig"])
@pytest.mark.parametrize(
    ("name", "version", "code", "says"),
    [
        ("nope", "", "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        ("nope", "1", "NOT_FOUND", "Request for unknown model: 'nope'"),
        ("double", "7", "NOT_FOUND", "Request for unknown model: 'double' version 7 is not found"),
        ("", "", "NOT_FOUND", "Request for unknown model: '' is not found"),
        ("double", "abc", "INVALID_ARGUMENT", "failed to get model version from specified version string 'abc'"),
        ("double", "0", "INVALID_ARGUMENT", "failed to get model version from specified version string '0'"),
    ],
)
def test_of_what_is_not_there(stub, method, name, version, code, says):
    got, message = refused(getattr(stub, method), getattr(pb, f"{method}Request")(name=name, version=version))
    assert got == code
    assert message.startswith(says)


def test_the_configuration_is_what_was_written_and_completed(stub):
    config = stub.ModelConfig(pb.ModelConfigRequest(name="double", version="1")).config
    assert (config.name, config.max_batch_size, config.platform) == ("double", 8, "onnxruntime_onnx")
    assert (config.input[0].data_type, list(config.input[0].dims)) == (config_pb2.TYPE_FP32, [4])
    assert config.parameters["note"].string_value == "kept"
    assert config.version_policy.latest.num_versions == 1
    assert [(group.kind, group.count) for group in config.instance_group] == [
        (config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    ]
    completed = stub.ModelConfig(pb.ModelConfigRequest(name="add")).config
    assert completed.max_batch_size > 1
    assert [tensor.name for tensor in completed.input] == ["a", "b"]
    assert stub.ModelConfig(pb.ModelConfigRequest(name="flat")).config.max_batch_size == 0


def test_labels_are_named_by_the_configuration(stub):
    config = stub.ModelConfig(pb.ModelConfigRequest(name="classes")).config
    assert config.output[0].label_filename == "labels.txt"


@pytest.mark.parametrize("ready", [True, False])
def test_the_index_has_every_version(stub, tmp_path, ready):
    index = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready)).models
    served = {path.name for path in served_models.write(tmp_path / "again").iterdir()}
    assert {row.name for row in index} == served
    assert {(row.state, row.reason) for row in index} == {("READY", "")}
    assert [row.version for row in index if row.name == "versions"] == ["1", "2", "3"]
