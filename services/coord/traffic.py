"""Traffic policy: the service of each call, the methods that may be retried, and the fields that name a model.

Envoy retries a method after an instance died while running it only if running it twice is harmless. Submit is not
retried by Envoy: the client decides, with an idempotency key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health_pb2

from mesh.xds.json_calls import JsonRoutes, check_script, json_calls
from mesh.xds.routes import ModelRoutes, RestRoutes, RouteTable, ServiceRoutes
from services.coord.inference import METHODS
from shoal.access.rest_paths import ASYNC_PREFERENCE, INFER_PATHS, REST_PATHS, STREAM_PATHS
from shoal.access.rpc_groups import GROUP_OF, INTERNAL
from shoal.coord.v1 import access_pb2, coord_pb2, shares_pb2
from shoal.inference.v2 import bulk_pb2, inference_pb2, trial_pb2
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2

STORE: ServiceDescriptor = store_pb2.DESCRIPTOR.services_by_name["StoreService"]
INGEST: ServiceDescriptor = ingest_pb2.DESCRIPTOR.services_by_name["IngestService"]
COORD: ServiceDescriptor = coord_pb2.DESCRIPTOR.services_by_name["CoordService"]
INFER: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
BULK: ServiceDescriptor = bulk_pb2.DESCRIPTOR.services_by_name["BulkInference"]
TRIALS: ServiceDescriptor = trial_pb2.DESCRIPTOR.services_by_name["ModelTrials"]
HEALTH: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]

ACCESS: ServiceDescriptor = access_pb2.DESCRIPTOR.services_by_name["AccessService"]
SHARES: ServiceDescriptor = shares_pb2.DESCRIPTOR.services_by_name["ShareService"]
SPANS: ServiceDescriptor = coord_pb2.DESCRIPTOR.services_by_name["SpanService"]
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

PUBLIC: dict[str, str] = {
    STORE.full_name: "store",
    INGEST.full_name: "ingest",
    COORD.full_name: "coord",
    INFER.full_name: "infer",
}
"""The gRPC services at the gateway, each with the service that serves it."""

AT_GATEWAY = (*PUBLIC, ACCESS.full_name, TRIALS.full_name, HEALTH.full_name, *REFLECTION)
"""Services that clients may call, by a policy. BULK is for services only."""

JSON_SERVICES = (INGEST, STORE, COORD, ACCESS)
"""The services with JSON calls."""

_STORE_IDEMPOTENT = (
    "StatArtifact",
    "GetArtifact",
    "RegisterModel",
    "ListModels",
    "WatchModels",
    "PutResults",
    "GetResult",
    "QueryResults",
    "WatchResults",
    "StreamResults",
    "ExportResults",
    "ListRetention",
    "ListUsage",
)
_INGEST_IDEMPOTENT = (
    "GetJob",
    "GetPayload",
    "ListJobs",
    "WatchJob",
    "ListDeadLetters",
    "WatchJobs",
    "GetJobOperation",
    "ListJobOperations",
    "GetSchedule",
    "ListSchedules",
    "ListJobRetention",
    "GetBatch",
    "ListBatches",
    "WatchBatch",
)
_COORD_IDEMPOTENT = (
    "ListInstances",
    "WatchInstances",
    "GetLeader",
    "GetMeshStatus",
    "GetSpans",
    "GetHistory",
    # The second of two equal marks changes nothing.
    "DrainInstance",
    "UndrainInstance",
)

_ACCESS_IDEMPOTENT = ("GetPolicy", "ListPolicies", "ListKeys", "RevokeKey")

_MODEL_FIELDS = {
    "ModelInfer": "model_name",
    "ModelStreamInfer": "model_name",
    "ModelReady": "name",
    "ModelMetadata": "name",
    "ModelConfig": "name",
}


_STEPS = ("ModelInfer", "ModelStreamInfer")
_PARAMETERS = "parameters"


def paths(service: ServiceDescriptor, methods: tuple[str, ...]) -> tuple[str, ...]:
    """Return the HTTP/2 paths of a service's methods.

    Raises:
        KeyError: the service has no such method.
    """
    return tuple(f"/{service.full_name}/{service.methods_by_name[method].name}" for method in methods)


def internal_methods(service: ServiceDescriptor) -> tuple[str, ...]:
    """Return the methods of a service that only services of the mesh may call."""
    names = (method.name for method in service.methods)
    return tuple(name for name in names if GROUP_OF.get(f"/{service.full_name}/{name}") == INTERNAL)


def table() -> RouteTable:
    """Return all routes of a node."""
    inference = f"/{INFER.full_name}/"
    return RouteTable(
        services=(
            ServiceRoutes(
                f"/{BULK.full_name}/", "infer", streaming=paths(BULK, ("InferBulk",)), names_model_itself=True
            ),
            # Coord responds for all infer instances.
            *(ServiceRoutes(path, "coord", all_idempotent=True) for path in paths(INFER, METHODS)),
            ServiceRoutes(inference, "infer", all_idempotent=True, apart=paths(INFER, ("ModelStreamInfer",))),
            ServiceRoutes(f"/{TRIALS.full_name}/", "infer"),
            ServiceRoutes(
                "/shoal.store.v1.",
                "store",
                idempotent=paths(STORE, _STORE_IDEMPOTENT),
                streaming=paths(STORE, ("PutArtifact",)),
                internal=paths(STORE, internal_methods(STORE)),
            ),
            ServiceRoutes(
                "/shoal.ingest.v1.",
                "ingest",
                idempotent=paths(INGEST, _INGEST_IDEMPOTENT),
                streaming=paths(INGEST, ("SubmitStream",)),
            ),
            ServiceRoutes(
                "/shoal.coord.v1.",
                "coord",
                idempotent=(*paths(COORD, _COORD_IDEMPOTENT), *paths(ACCESS, _ACCESS_IDEMPOTENT)),
                internal=(*paths(SHARES, internal_methods(SHARES)), *paths(SPANS, internal_methods(SPANS))),
            ),
            # Coord responds for all services, from membership.
            ServiceRoutes("/grpc.health.v1.", "coord", all_idempotent=True, traced=False),
            ServiceRoutes("/grpc.reflection.", "coord", all_idempotent=True, traced=False),
        ),
        rest="infer",
        models=ModelRoutes(
            prefix=inference,
            fields=tuple((f"{INFER.full_name}.{method}", field) for method, field in sorted(_MODEL_FIELDS.items())),
            descriptors=_with_raw_entries(descriptors(INFER.file)),
            steps=tuple(f"{INFER.full_name}.{method}" for method in _STEPS),
            streams=(f"{INFER.full_name}.ModelStreamInfer",),
            parameters=_PARAMETERS,
            parameters_number=_number("ModelInfer", _PARAMETERS),
            model_number=_number(*next(iter(_MODEL_FIELDS.items()))),
        ),
        # After the death of one replica, a delayed health check of the other must not fail the calls of operators.
        tried_unhealthy=frozenset({"coord"}),
        json=_json_routes(JSON_SERVICES),
        rest_elsewhere=(
            # Coord responds for all infer instances.
            RestRoutes(tuple(path for path in REST_PATHS if path.rpc in paths(INFER, METHODS)), "coord"),
            # Such a request becomes a job. It may not run twice: clients repeat it with an idempotency key.
            RestRoutes(INFER_PATHS, "ingest", is_idempotent=False, headers=(("prefer", ASYNC_PREFERENCE),)),
            *(RestRoutes((path,), PUBLIC[path.rpc.split("/")[1]]) for path in STREAM_PATHS),
        ),
    )


def _number(method: str, field: str) -> int:
    """Return the number of a field of a method's request."""
    number: int = INFER.methods_by_name[method].input_type.fields_by_name[field].number
    return number


def _json_routes(services: Sequence[ServiceDescriptor]) -> JsonRoutes:
    return JsonRoutes(
        prefix="/shoal/v1/",
        cluster="coord",
        services=tuple(service.full_name for service in services),
        descriptors=descriptors(*(service.file for service in services)),
        script=check_script(list(json_calls(services))),
    )


def _with_raw_entries(serialized: bytes) -> bytes:
    """Return the descriptors with the parameters of an inference request declared as bytes, one value per map entry.

    Envoy's filter cannot select a map entry by its key. On the wire, a map entry is a message, and a message has the
    encoding of bytes. So the filter extracts whole entries, and the Lua filter searches for the key.
    """
    found = FileDescriptorSet.FromString(serialized)
    for file in found.file:
        for message in file.message_type:
            if file.package == INFER.file.package and message.name == "ModelInferRequest":
                (field,) = (each for each in message.field if each.name == _PARAMETERS)
                field.type = FieldDescriptorProto.TYPE_STRING
                field.ClearField("type_name")
    return found.SerializeToString()


def descriptors(*files: FileDescriptor) -> bytes:
    """Return a serialized FileDescriptorSet of `files` and all their imports, imports first."""
    found = FileDescriptorSet()
    seen: set[str] = set()

    def add(one: FileDescriptor) -> None:
        if one.name not in seen:
            seen.add(one.name)
            for imported in one.dependencies:
                add(imported)
            one.CopyToProto(found.file.add())

    for file in files:
        add(file)
    return found.SerializeToString()
