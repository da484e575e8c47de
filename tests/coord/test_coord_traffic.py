"""The traffic policy names methods and services that exist, and repeats only what may be repeated."""

from __future__ import annotations

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from services.coord import traffic
from services.coord.inference import METHODS
from shoal.access.rpc_groups import GROUP_OF, INTERNAL


def test_every_public_service_has_a_route():
    prefixes = [route.prefix for route in traffic.table().services]
    for name in [*traffic.PUBLIC, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]:
        assert any(f"/{name}/".startswith(prefix) for prefix in prefixes), name


def test_what_only_services_may_call_is_refused_at_the_gateway_or_has_no_service_there():
    refused = {path for service in traffic.table().services for path in service.internal}
    bulk = f"/{traffic.BULK.full_name}/"
    assert {rpc for rpc, group in GROUP_OF.items() if group == INTERNAL and not rpc.startswith(bulk)} == refused


def test_nothing_that_submits_or_changes_is_idempotent():
    repeated = {path for route in traffic.table().services for path in route.idempotent}
    for path in repeated:
        method = path.rpartition("/")[2]
        assert method.startswith(("Get", "List", "Watch", "Stat", "Query")) or method in (
            "PutResults",
            "RegisterModel",
            "StreamResults",
            "DrainInstance",
            "UndrainInstance",
            # A key that is revoked stays revoked.
            "RevokeKey",
            "ExportResults",  # Another one goes on where it ended, or says that one lies there.
        )


def test_every_method_that_names_a_model_is_searched_for_it():
    models = traffic.table().models
    found = dict(models.fields)
    for method in traffic.INFER.methods:
        fields = method.input_type.fields_by_name
        named = next((name for name in ("model_name", "name") if name in fields), None)
        if method.name.startswith("Model") and named and method.name not in METHODS:
            assert found[f"{traffic.INFER.full_name}.{method.name}"] == named


def test_the_descriptors_stand_on_their_own():
    files = FileDescriptorSet.FromString(traffic.table().models.descriptors).file
    seen: set[str] = set()
    for file in files:
        assert set(file.dependency) <= seen
        seen.add(file.name)
    assert "shoal/inference/v2/inference.proto" in seen
