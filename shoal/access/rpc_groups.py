"""Groups of RPCs: a policy allows groups, and every RPC of every public service belongs to exactly one.

An RPC is its path, `/package.Service/Method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

READ: Final = "read"
INFER: Final = "infer"
JOBS: Final = "jobs"
MODELS: Final = "models"
CODE: Final = "code"
OPERATE: Final = "operate"
ADMINISTER: Final = "administer"
HEALTH: Final = "health"
INTERNAL: Final = "internal"

GRANTABLE: Mapping[str, str] = {
    HEALTH: "health of the server",
    READ: "metadata, configuration, statistics and lists",
    INFER: "inference",
    JOBS: "own jobs, batches, schedules and results",
    MODELS: "load, unload, push and remove models",
    CODE: "models that run code or reach other addresses: Python models, `file:` and `config` of a load",
    OPERATE: "tenants, limits, retention, drains, backups, history of the metrics",
    ADMINISTER: "policy, keys, audit",
}
"""Groups that a policy may grant. INTERNAL is for services only, and has no route at a gateway."""

_INFERENCE = "/inference.GRPCInferenceService/"
_INGEST = "/shoal.ingest.v1.IngestService/"
_STORE = "/shoal.store.v1.StoreService/"
_COORD = "/shoal.coord.v1.CoordService/"
ACCESS_SERVICE: Final = "/shoal.coord.v1.AccessService/"
"""Prefix of the RPCs that change who may call what."""
_HEALTH = "/grpc.health.v1.Health/"

LOAD: Final = _INFERENCE + "RepositoryModelLoad"
LOAD_WITH_CODE: Final = LOAD + "#code"
"""A load with parameters. It needs CODE beside the group of a plain load; no call has this path."""
INDEX: Final = _INFERENCE + "RepositoryIndex"
MODEL_INFER: Final = _INFERENCE + "ModelInfer"
MODEL_STREAM_INFER: Final = _INFERENCE + "ModelStreamInfer"
TRY_MODEL: Final = "/shoal.inference.v2.ModelTrials/TryModel"
APPLY_POLICY: Final = ACCESS_SERVICE + "ApplyPolicy"
CREATE_KEY: Final = ACCESS_SERVICE + "CreateKey"
LIST_KEYS: Final = ACCESS_SERVICE + "ListKeys"
ROLL_BACK: Final = ACCESS_SERVICE + "RollBackPolicy"
ROTATE_SIGNER: Final = ACCESS_SERVICE + "RotateSigner"
TRY_MODEL_WITH_CODE: Final = TRY_MODEL + "#code"
"""A trial load of a model that runs code, as LOAD_WITH_CODE."""
OF_LAUNCHER = frozenset({INDEX, CREATE_KEY, LIST_KEYS, ROLL_BACK, APPLY_POLICY})
"""RPCs that the process that started a server, or another one of its user, calls at the server's own socket."""
SUBMIT: Final = _INGEST + "Submit"
INFERS_LATER: Final = frozenset(
    _INGEST + method for method in ("Submit", "SubmitStream", "RunStream", "PutSchedule", "SubmitBatch")
)
"""RPCs that have a model run later, as jobs: their callers need the group of ModelInfer beside that of the RPC."""
LIST_MODELS: Final = _STORE + "ListModels"
REGISTER: Final = _STORE + "RegisterModel"
REGISTER_WITH_CODE: Final = REGISTER + "#code"
"""A registration of a model that runs code or reaches other addresses, as LOAD_WITH_CODE."""
REMOVE: Final = _STORE + "RemoveModel"
SET_ALIAS: Final = _STORE + "SetAlias"
GET_SPANS: Final = _COORD + "GetSpans"
SPANS_OF_ALL: Final = GET_SPANS + "#all"
"""A read of the spans of every tenant, as LOAD_WITH_CODE."""
LIST_SPANS: Final = "/shoal.coord.v1.SpanService/ListSpans"
CLAIM_SHARES: Final = "/shoal.coord.v1.ShareService/ClaimShares"
INFER_BULK: Final = "/shoal.inference.v2.BulkInference/InferBulk"


def _table(prefix: str, groups: Mapping[str, str]) -> dict[str, str]:
    return {prefix + method: group for group, methods in groups.items() for method in methods.split()}


GROUP_OF: Mapping[str, str] = {
    **_table(
        _INFERENCE,
        {
            HEALTH: "ServerLive ServerReady",
            READ: "ServerMetadata ModelReady ModelMetadata ModelConfig ModelStatistics RepositoryIndex",
            # Clients call the methods of shared memory before they infer, whether or not they use it.
            INFER: """ModelInfer ModelStreamInfer
                SystemSharedMemoryStatus SystemSharedMemoryRegister SystemSharedMemoryUnregister
                CudaSharedMemoryStatus CudaSharedMemoryRegister CudaSharedMemoryUnregister""",
            MODELS: "RepositoryModelLoad RepositoryModelUnload",
            CODE: "RepositoryModelLoad#code",
            OPERATE: "TraceSetting LogSettings",
        },
    ),
    INFER_BULK: INTERNAL,
    # The first step of a push.
    TRY_MODEL: MODELS,
    TRY_MODEL_WITH_CODE: CODE,
    **_table(
        _INGEST,
        {
            JOBS: """Submit SubmitStream RunStream GetJob GetPayload ListJobs WatchJob WatchJobs CancelJob
                ListDeadLetters RequeueDeadLetters PurgeDeadLetters
                StartJobOperation GetJobOperation ListJobOperations AbortJobOperation
                PutSchedule GetSchedule ListSchedules PauseSchedule RemoveSchedule
                SubmitBatch GetBatch ListBatches WatchBatch CancelBatch PauseBatch ResumeBatch""",
            OPERATE: "SetJobRetention ListJobRetention SetTenant GetTenant ListTenants ListConnectors",
        },
    ),
    **_table(
        _STORE,
        {
            READ: "ListModels WatchModels",
            JOBS: "GetResult QueryResults WatchResults StreamResults ExportResults",
            MODELS: "PutArtifact StatArtifact GetArtifact RegisterModel RemoveModel SetAlias",
            CODE: "RegisterModel#code",
            OPERATE: """SetRetention ListRetention ApplyRetention SetQuota ListUsage VerifyStore CollectArtifacts
                BackUp Restore""",
            ADMINISTER: "StreamAudit VerifyAudit",
            # The names of references are ids of jobs, of all tenants.
            INTERNAL: "PutResults ReleaseArtifacts ListReferences RecordAudit",
        },
    ),
    **_table(
        _COORD,
        {
            READ: "ListInstances WatchInstances GetLeader GetMeshStatus GetSpans",
            # The history names the tenants.
            OPERATE: "DrainInstance UndrainInstance GetHistory GetSpans#all",
        },
    ),
    LIST_SPANS: INTERNAL,
    **_table(
        ACCESS_SERVICE,
        {
            ADMINISTER: """GetPolicy ListPolicies ApplyPolicy RollBackPolicy
                CreateKey ListKeys RevokeKey RotateSigner"""
        },
    ),
    # The answer tells nothing, and a claim takes from others.
    CLAIM_SHARES: INTERNAL,
    **_table(_HEALTH, {HEALTH: "Check Watch List"}),
    **_table("/grpc.reflection.v1alpha.ServerReflection/", {READ: "ServerReflectionInfo"}),
    **_table("/grpc.reflection.v1.ServerReflection/", {READ: "ServerReflectionInfo"}),
}
"""Group by the path of the RPC."""

_MODEL_METHODS = (
    "ModelReady",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryModelLoad",
    "RepositoryModelLoad#code",
    "RepositoryModelUnload",
)
MODEL_RPCS = frozenset(_INFERENCE + method for method in _MODEL_METHODS) | {INFER_BULK, TRY_MODEL, TRY_MODEL_WITH_CODE}
"""RPCs whose messages name a model."""


def is_health_check(rpc: str) -> bool:
    """Return True for the RPCs of grpc.health.v1, with which an Envoy checks its endpoints."""
    return rpc.startswith(_HEALTH)


def rpc_named(name: str) -> str | None:
    """Return the path of a path or of a plain method name, such as `ModelInfer`; None when there is no such RPC.

    A name that several services have, such as `Check`, is the first one's.
    """
    if name in GROUP_OF:
        return name
    return next((rpc for rpc in GROUP_OF if rpc.rpartition("/")[2] == name), None)
