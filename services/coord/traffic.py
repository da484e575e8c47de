"""The traffic policy: which calls go to which service, what may be retried, what names a model.

A method may be retried after an instance died on it only if running it twice does no harm. Submit is not among them:
its caller decides, with an idempotency key.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health_pb2

from mesh.xds.routes import ModelRoutes, ServiceRoutes, Table
from shoal.coord.v1 import coord_pb2
from shoal.inference.v2 import bulk_pb2, inference_pb2
from shoal.ingest.v1 import ingest_pb2
from shoal.store.v1 import store_pb2

STORE: ServiceDescriptor = store_pb2.DESCRIPTOR.services_by_name["StoreService"]
INGEST: ServiceDescriptor = ingest_pb2.DESCRIPTOR.services_by_name["IngestService"]
COORD: ServiceDescriptor = coord_pb2.DESCRIPTOR.services_by_name["CoordService"]
INFER: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
BULK: ServiceDescriptor = bulk_pb2.DESCRIPTOR.services_by_name["BulkInference"]
HEALTH: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]

PUBLIC: dict[str, str] = {
    STORE.full_name: "store",
    INGEST.full_name: "ingest",
    COORD.full_name: "coord",
    INFER.full_name: "infer",
}
"""The gRPC services that a client finds at the gateway, and who serves them."""

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
_OF_BATCHES = ("GetBatch", "ListBatches", "WatchBatch")
_OF_LIFE = ("ListDeadLetters", "WatchJobs", "GetSchedule", "ListSchedules", "ListJobRetention")
_INGEST_IDEMPOTENT = ("GetJob", "GetPayload", "ListJobs", "WatchJob", *_OF_LIFE, *_OF_BATCHES)
_COORD_IDEMPOTENT = ("ListInstances", "WatchInstances", "GetLeader", "GetMeshStatus")

_MODEL_FIELDS = {
    "ModelInfer": "model_name",
    "ModelStreamInfer": "model_name",
    "ModelReady": "name",
    "ModelMetadata": "name",
    "ModelConfig": "name",
    "ModelStatistics": "name",
}


_STEPS = ("ModelInfer", "ModelStreamInfer")
_PARAMETERS = "parameters"


def paths(service: ServiceDescriptor, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The HTTP/2 paths of a service's methods.

    Raises:
        KeyError: it has no such method.
    """
    return tuple(f"/{service.full_name}/{service.methods_by_name[method].name}" for method in methods)


def table() -> Table:
    """All routes of a node."""
    inference = f"/{INFER.full_name}/"
    return Table(
        services=(
            ServiceRoutes(
                f"/{BULK.full_name}/", "infer", streaming=paths(BULK, ("InferBulk",)), names_model_itself=True
            ),
            ServiceRoutes(inference, "infer", all_idempotent=True),
            ServiceRoutes(
                "/shoal.store.v1.",
                "store",
                idempotent=paths(STORE, _STORE_IDEMPOTENT),
                streaming=paths(STORE, ("PutArtifact",)),
            ),
            ServiceRoutes(
                "/shoal.ingest.v1.",
                "ingest",
                idempotent=paths(INGEST, _INGEST_IDEMPOTENT),
                streaming=paths(INGEST, ("SubmitStream",)),
            ),
            ServiceRoutes("/shoal.coord.v1.", "coord", idempotent=paths(COORD, _COORD_IDEMPOTENT)),
            # Coord answers for all: from membership it knows who is ready.
            ServiceRoutes("/grpc.health.v1.", "coord", all_idempotent=True, traced=False),
            ServiceRoutes("/grpc.reflection.", "coord", all_idempotent=True, traced=False),
        ),
        models=ModelRoutes(
            prefix=inference,
            fields=tuple((f"{INFER.full_name}.{method}", field) for method, field in sorted(_MODEL_FIELDS.items())),
            descriptors=_with_raw_entries(descriptors(INFER.file)),
            steps=tuple(f"{INFER.full_name}.{method}" for method in _STEPS),
            parameters=_PARAMETERS,
        ),
    )


def _with_raw_entries(serialized: bytes) -> bytes:
    """The descriptors with the parameters of an inference request as bytes, entry by entry.

    Envoy's filter cannot pick an entry of a map by its key. On the wire an entry is a message like any other, and a
    message the same as bytes: so it takes them out whole, and the Lua filter looks for the key.
    """
    found = FileDescriptorSet.FromString(serialized)
    for file in found.file:
        for message in file.message_type:
            if file.package == INFER.file.package and message.name == "ModelInferRequest":
                (field,) = (each for each in message.field if each.name == _PARAMETERS)
                field.type = FieldDescriptorProto.TYPE_STRING
                field.ClearField("type_name")
    return found.SerializeToString()


def descriptors(file: FileDescriptor) -> bytes:
    """A serialized FileDescriptorSet of `file` and all that it imports, imports first."""
    found = FileDescriptorSet()
    seen: set[str] = set()

    def add(one: FileDescriptor) -> None:
        if one.name not in seen:
            seen.add(one.name)
            for imported in one.dependencies:
                add(imported)
            one.CopyToProto(found.file.add())

    add(file)
    return found.SerializeToString()
