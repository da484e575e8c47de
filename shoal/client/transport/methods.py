"""RPCs that the client makes: path, message types, and idempotence.

Idempotent: a repeated call changes nothing more and returns the same response. A test compares this table with the
.proto files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from shoal.coord.v1 import access_pb2 as access
from shoal.coord.v1 import coord_pb2 as coord
from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import trial_pb2 as trial
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


@dataclass(frozen=True)
class Method(Generic[Q, R]):
    """One RPC method."""

    path: str
    request: type[Q]
    response: type[R]
    idempotent: bool = True

    @property
    def name(self) -> str:
        """Method name: `GetJob` of `/shoal.ingest.v1.IngestService/GetJob`."""
        return self.path.rpartition("/")[2]


_OIP = "/inference.GRPCInferenceService/"
MODEL_INFER = Method(_OIP + "ModelInfer", oip.ModelInferRequest, oip.ModelInferResponse)
MODEL_STREAM_INFER = Method(_OIP + "ModelStreamInfer", oip.ModelInferRequest, oip.ModelStreamInferResponse, False)
SERVER_LIVE = Method(_OIP + "ServerLive", oip.ServerLiveRequest, oip.ServerLiveResponse)
SERVER_READY = Method(_OIP + "ServerReady", oip.ServerReadyRequest, oip.ServerReadyResponse)
MODEL_READY = Method(_OIP + "ModelReady", oip.ModelReadyRequest, oip.ModelReadyResponse)
MODEL_METADATA = Method(_OIP + "ModelMetadata", oip.ModelMetadataRequest, oip.ModelMetadataResponse)
MODEL_CONFIG = Method(_OIP + "ModelConfig", oip.ModelConfigRequest, oip.ModelConfigResponse)
MODEL_STATISTICS = Method(_OIP + "ModelStatistics", oip.ModelStatisticsRequest, oip.ModelStatisticsResponse)
REPOSITORY_INDEX = Method(_OIP + "RepositoryIndex", oip.RepositoryIndexRequest, oip.RepositoryIndexResponse)
MODEL_LOAD = Method(_OIP + "RepositoryModelLoad", oip.RepositoryModelLoadRequest, oip.RepositoryModelLoadResponse)
MODEL_UNLOAD = Method(
    _OIP + "RepositoryModelUnload", oip.RepositoryModelUnloadRequest, oip.RepositoryModelUnloadResponse
)
# Not idempotent: a model that ends its instance would end others.
TRY_MODEL = Method("/shoal.inference.v2.ModelTrials/TryModel", trial.TryModelRequest, trial.TryModelResponse, False)

_STORE = "/shoal.store.v1.StoreService/"
PUT_ARTIFACT = Method(_STORE + "PutArtifact", store.PutArtifactRequest, store.PutArtifactResponse)
STAT_ARTIFACT = Method(_STORE + "StatArtifact", store.StatArtifactRequest, store.StatArtifactResponse)
GET_ARTIFACT = Method(_STORE + "GetArtifact", store.GetArtifactRequest, store.GetArtifactResponse)
REGISTER_MODEL = Method(_STORE + "RegisterModel", store.RegisterModelRequest, store.RegisterModelResponse)
LIST_MODELS = Method(_STORE + "ListModels", store.ListModelsRequest, store.ListModelsResponse)
# Not idempotent: a second removal is NOT_FOUND, so a retry would report a failure after a success.
REMOVE_MODEL = Method(_STORE + "RemoveModel", store.RemoveModelRequest, store.RemoveModelResponse, False)
SET_ALIAS = Method(_STORE + "SetAlias", store.SetAliasRequest, store.SetAliasResponse)
GET_RESULT = Method(_STORE + "GetResult", store.GetResultRequest, store.GetResultResponse)
QUERY_RESULTS = Method(_STORE + "QueryResults", store.QueryResultsRequest, store.QueryResultsResponse)
LIST_RETENTION = Method(_STORE + "ListRetention", store.ListRetentionRequest, store.ListRetentionResponse)
SET_RETENTION = Method(_STORE + "SetRetention", store.SetRetentionRequest, store.SetRetentionResponse)
LIST_USAGE = Method(_STORE + "ListUsage", store.ListUsageRequest, store.ListUsageResponse)
SET_QUOTA = Method(_STORE + "SetQuota", store.SetQuotaRequest, store.SetQuotaResponse)
EXPORT_RESULTS = Method(_STORE + "ExportResults", store.ExportResultsRequest, store.ExportResultsResponse)
VERIFY_STORE = Method(_STORE + "VerifyStore", store.VerifyStoreRequest, store.VerifyStoreResponse)
COLLECT_ARTIFACTS = Method(_STORE + "CollectArtifacts", store.CollectArtifactsRequest, store.CollectArtifactsResponse)
STREAM_AUDIT = Method(_STORE + "StreamAudit", store.StreamAuditRequest, store.StreamAuditResponse)
VERIFY_AUDIT = Method(_STORE + "VerifyAudit", store.VerifyAuditRequest, store.VerifyAuditResponse)
# Not idempotent: each backup is another one, and a silent second restore would hide the progress of the first.
BACK_UP = Method(_STORE + "BackUp", store.BackUpRequest, store.BackUpResponse, False)
RESTORE = Method(_STORE + "Restore", store.RestoreRequest, store.RestoreResponse, False)
STREAM_RESULTS = Method(_STORE + "StreamResults", store.StreamResultsRequest, store.StreamResultsResponse)

_INGEST = "/shoal.ingest.v1.IngestService/"
# Idempotent because the client never submits without an idempotency key.
SUBMIT = Method(_INGEST + "Submit", ingest.SubmitRequest, ingest.SubmitResponse)
SUBMIT_STREAM = Method(_INGEST + "SubmitStream", ingest.SubmitStreamRequest, ingest.SubmitStreamResponse)
RUN_STREAM = Method(_INGEST + "RunStream", ingest.RunStreamRequest, ingest.RunStreamResponse)
LIST_CONNECTORS = Method(_INGEST + "ListConnectors", ingest.ListConnectorsRequest, ingest.ListConnectorsResponse)
GET_JOB = Method(_INGEST + "GetJob", ingest.GetJobRequest, ingest.GetJobResponse)
GET_PAYLOAD = Method(_INGEST + "GetPayload", ingest.GetPayloadRequest, ingest.GetPayloadResponse)
LIST_JOBS = Method(_INGEST + "ListJobs", ingest.ListJobsRequest, ingest.ListJobsResponse)
WATCH_JOB = Method(_INGEST + "WatchJob", ingest.WatchJobRequest, ingest.WatchJobResponse)
WATCH_JOBS = Method(_INGEST + "WatchJobs", ingest.WatchJobsRequest, ingest.WatchJobsResponse)
CANCEL_JOB = Method(_INGEST + "CancelJob", ingest.CancelJobRequest, ingest.CancelJobResponse)
LIST_DEAD_LETTERS = Method(_INGEST + "ListDeadLetters", ingest.ListDeadLettersRequest, ingest.ListDeadLettersResponse)
# Not idempotent: a repeat after a lost response finds nothing left to do, and reports less than was done.
REQUEUE_DEAD_LETTERS = Method(
    _INGEST + "RequeueDeadLetters", ingest.RequeueDeadLettersRequest, ingest.RequeueDeadLettersResponse, False
)
PURGE_DEAD_LETTERS = Method(
    _INGEST + "PurgeDeadLetters", ingest.PurgeDeadLettersRequest, ingest.PurgeDeadLettersResponse, False
)
# Not idempotent: a repeat would start a second operation.
START_JOB_OPERATION = Method(
    _INGEST + "StartJobOperation", ingest.StartJobOperationRequest, ingest.StartJobOperationResponse, False
)
GET_JOB_OPERATION = Method(_INGEST + "GetJobOperation", ingest.GetJobOperationRequest, ingest.GetJobOperationResponse)
LIST_JOB_OPERATIONS = Method(
    _INGEST + "ListJobOperations", ingest.ListJobOperationsRequest, ingest.ListJobOperationsResponse
)
ABORT_JOB_OPERATION = Method(
    _INGEST + "AbortJobOperation", ingest.AbortJobOperationRequest, ingest.AbortJobOperationResponse
)
SET_JOB_RETENTION = Method(_INGEST + "SetJobRetention", ingest.SetJobRetentionRequest, ingest.SetJobRetentionResponse)
LIST_JOB_RETENTION = Method(
    _INGEST + "ListJobRetention", ingest.ListJobRetentionRequest, ingest.ListJobRetentionResponse
)
SET_TENANT = Method(_INGEST + "SetTenant", ingest.SetTenantRequest, ingest.SetTenantResponse)
GET_TENANT = Method(_INGEST + "GetTenant", ingest.GetTenantRequest, ingest.GetTenantResponse)
LIST_TENANTS = Method(_INGEST + "ListTenants", ingest.ListTenantsRequest, ingest.ListTenantsResponse)

# Idempotent because the client never submits a batch without an idempotency key.
SUBMIT_BATCH = Method(_INGEST + "SubmitBatch", ingest.SubmitBatchRequest, ingest.SubmitBatchResponse)
GET_BATCH = Method(_INGEST + "GetBatch", ingest.GetBatchRequest, ingest.GetBatchResponse)
LIST_BATCHES = Method(_INGEST + "ListBatches", ingest.ListBatchesRequest, ingest.ListBatchesResponse)
WATCH_BATCH = Method(_INGEST + "WatchBatch", ingest.WatchBatchRequest, ingest.WatchBatchResponse)
CANCEL_BATCH = Method(_INGEST + "CancelBatch", ingest.CancelBatchRequest, ingest.CancelBatchResponse)
PAUSE_BATCH = Method(_INGEST + "PauseBatch", ingest.PauseBatchRequest, ingest.PauseBatchResponse)
RESUME_BATCH = Method(_INGEST + "ResumeBatch", ingest.ResumeBatchRequest, ingest.ResumeBatchResponse)
# Not idempotent: a second put without `replace` is ALREADY_EXISTS, a second removal is NOT_FOUND, so a retry would
# report a failure after a success.
PUT_SCHEDULE = Method(_INGEST + "PutSchedule", ingest.PutScheduleRequest, ingest.PutScheduleResponse, False)
GET_SCHEDULE = Method(_INGEST + "GetSchedule", ingest.GetScheduleRequest, ingest.GetScheduleResponse)
LIST_SCHEDULES = Method(_INGEST + "ListSchedules", ingest.ListSchedulesRequest, ingest.ListSchedulesResponse)
PAUSE_SCHEDULE = Method(_INGEST + "PauseSchedule", ingest.PauseScheduleRequest, ingest.PauseScheduleResponse)
REMOVE_SCHEDULE = Method(_INGEST + "RemoveSchedule", ingest.RemoveScheduleRequest, ingest.RemoveScheduleResponse, False)

_COORD = "/shoal.coord.v1.CoordService/"
LIST_INSTANCES = Method(_COORD + "ListInstances", coord.ListInstancesRequest, coord.ListInstancesResponse)
GET_LEADER = Method(_COORD + "GetLeader", coord.GetLeaderRequest, coord.GetLeaderResponse)
GET_HISTORY = Method(_COORD + "GetHistory", coord.GetHistoryRequest, coord.GetHistoryResponse)
GET_MESH_STATUS = Method(_COORD + "GetMeshStatus", coord.GetMeshStatusRequest, coord.GetMeshStatusResponse)
GET_SPANS = Method(_COORD + "GetSpans", coord.GetSpansRequest, coord.GetSpansResponse)
DRAIN_INSTANCE = Method(_COORD + "DrainInstance", coord.DrainInstanceRequest, coord.DrainInstanceResponse)
UNDRAIN_INSTANCE = Method(_COORD + "UndrainInstance", coord.UndrainInstanceRequest, coord.UndrainInstanceResponse)

_ACCESS = "/shoal.coord.v1.AccessService/"
GET_POLICY = Method(_ACCESS + "GetPolicy", access.GetPolicyRequest, access.GetPolicyResponse)
LIST_POLICIES = Method(_ACCESS + "ListPolicies", access.ListPoliciesRequest, access.ListPoliciesResponse)
APPLY_POLICY = Method(_ACCESS + "ApplyPolicy", access.ApplyPolicyRequest, access.ApplyPolicyResponse, idempotent=False)
ROLL_BACK_POLICY = Method(
    _ACCESS + "RollBackPolicy", access.RollBackPolicyRequest, access.RollBackPolicyResponse, idempotent=False
)
CREATE_KEY = Method(_ACCESS + "CreateKey", access.CreateKeyRequest, access.CreateKeyResponse, idempotent=False)
LIST_KEYS = Method(_ACCESS + "ListKeys", access.ListKeysRequest, access.ListKeysResponse)
REVOKE_KEY = Method(_ACCESS + "RevokeKey", access.RevokeKeyRequest, access.RevokeKeyResponse)
ROTATE_SIGNER = Method(
    _ACCESS + "RotateSigner", access.RotateSignerRequest, access.RotateSignerResponse, idempotent=False
)
