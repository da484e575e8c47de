"""Every RPC of every public service has a group."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from shoal.access.rpc_groups import GRANTABLE, GROUP_OF, INTERNAL, rpc_named
from shoal.coord.v1 import access_pb2, coord_pb2, shares_pb2
from shoal.inference.v2 import bulk_pb2, inference_pb2, trial_pb2
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2

FILES = (
    *(inference_pb2, bulk_pb2, trial_pb2, ingest_pb2, store_pb2, coord_pb2, access_pb2, shares_pb2),
    *(health_pb2, reflection_pb2),
)


def services() -> Iterator[ServiceDescriptor]:
    for file in FILES:
        yield from file.DESCRIPTOR.services_by_name.values()


def rpcs() -> set[str]:
    return {f"/{service.full_name}/{method.name}" for service in services() for method in service.methods}


def test_every_rpc_belongs_to_a_group() -> None:
    assert rpcs() - GROUP_OF.keys() == set()
    assert set(GROUP_OF.values()) <= {*GRANTABLE, INTERNAL}


def test_every_path_with_a_group_is_an_rpc() -> None:
    known = {service.full_name for service in services()}
    named = {rpc for rpc in GROUP_OF if rpc.split("/")[1] in known and "#" not in rpc}
    assert named - rpcs() <= {"/grpc.health.v1.Health/List"}


def test_what_services_call_among_themselves_is_internal() -> None:
    internal = {rpc.rpartition("/")[2] for rpc, group in GROUP_OF.items() if group == INTERNAL}
    of_store = {"PutResults", "ReleaseArtifacts", "ListReferences", "RecordAudit"}
    assert internal == {*of_store, "InferBulk", "ClaimShares", "ListSpans"}


def test_an_rpc_is_found_by_its_path_or_its_method() -> None:
    assert rpc_named("ModelInfer") == rpc_named("/inference.GRPCInferenceService/ModelInfer")
    assert rpc_named("Nothing") is None
