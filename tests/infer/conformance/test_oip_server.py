"""What a server says of itself: liveness, readiness, metadata, health, reflection, and what it does not do."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from shoal import __version__
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire

SERVICE = "inference.GRPCInferenceService"
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
SHARED_MEMORY = [name for name in METHODS if "SharedMemory" in name]


def test_it_is_live_and_ready(stub):
    assert stub.ServerLive(pb.ServerLiveRequest()).live is True
    assert stub.ServerReady(pb.ServerReadyRequest()).ready is True


def test_its_metadata(stub):
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("shoal", __version__)
    assert {"classification", "model_configuration", "schedule_policy", "statistics"} <= set(metadata.extensions)
    # What returns UNIMPLEMENTED is not promised.
    assert not [name for name in metadata.extensions if "shared_memory" in name]


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("double", "", True),
        ("double", "1", True),
        ("double", "2", False),
        ("versions", "2", True),
        ("nope", "", False),
        ("nope", "3", False),
        ("", "", False),
    ],
)
def test_model_ready_is_a_response_and_no_error(stub, name, version, ready):
    assert stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready is ready


@pytest.mark.parametrize("version", ["abc", "-1", "0", "1.0", " 1", "99999999999999999999"])
def test_model_ready_of_what_is_no_version(stub, version):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelReady(pb.ModelReadyRequest(name="double", version=version))
    code, message = wire.status(caught.value)
    assert code == "INVALID_ARGUMENT"
    assert message.startswith(f"failed to get model version from specified version string '{version}'")


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health(channel, service):
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=wire.PATIENCE_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_health_of_an_unknown_service(channel):
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nope"))
    assert wire.status(caught.value)[0] == "NOT_FOUND"


def test_reflection_is_enough_to_call_it(channel):
    """A client that has no .proto: it asks what there is, builds the messages, and infers."""
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName(SERVICE)
    assert [method.name for method in service.methods] == METHODS
    method = service.FindMethodByName("ModelInfer")
    request = GetMessageClass(method.input_type)(model_name="double")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1, 2, 3, 4])
    call = channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    response = call(request, timeout=wire.PATIENCE_S)
    assert (response.outputs[0].name, list(response.outputs[0].shape)) == ("y", [1, 4])


@pytest.mark.parametrize("method", SHARED_MEMORY)
def test_shared_memory_is_refused_by_name(stub, method):
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(getattr(pb, f"{method}Request")(), timeout=wire.PATIENCE_S)
    code, message = wire.status(caught.value)
    assert code == "UNIMPLEMENTED"
    assert method in message


@pytest.mark.parametrize("path", [f"/{SERVICE}/Nope", "/nope.Service/Infer", "/inference/ModelInfer"])
def test_a_method_that_is_none(channel, path):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"", timeout=wire.PATIENCE_S)
    assert wire.status(caught.value)[0] == "UNIMPLEMENTED"
