import datetime

from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from shoal.inference.v2 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutArtifactRequest(_message.Message):
    __slots__ = ("header", "chunk")
    class Header(_message.Message):
        __slots__ = ("sha256", "size_bytes", "offset", "reference", "tenant")
        SHA256_FIELD_NUMBER: _ClassVar[int]
        SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        REFERENCE_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        sha256: str
        size_bytes: int
        offset: int
        reference: str
        tenant: str
        def __init__(self, sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., reference: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PutArtifactRequest.Header
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PutArtifactRequest.Header, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PutArtifactResponse(_message.Message):
    __slots__ = ("artifact", "existed", "over_quota")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    OVER_QUOTA_FIELD_NUMBER: _ClassVar[int]
    artifact: Artifact
    existed: bool
    over_quota: TenantUsage
    def __init__(self, artifact: _Optional[_Union[Artifact, _Mapping]] = ..., existed: _Optional[bool] = ..., over_quota: _Optional[_Union[TenantUsage, _Mapping]] = ...) -> None: ...

class Artifact(_message.Message):
    __slots__ = ("sha256", "size_bytes", "created_at")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size_bytes: int
    created_at: _timestamp_pb2.Timestamp
    def __init__(self, sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class StatArtifactRequest(_message.Message):
    __slots__ = ("sha256", "caller")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    caller: bytes
    def __init__(self, sha256: _Optional[str] = ..., caller: _Optional[bytes] = ...) -> None: ...

class StatArtifactResponse(_message.Message):
    __slots__ = ("artifact", "received_bytes")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    artifact: Artifact
    received_bytes: int
    def __init__(self, artifact: _Optional[_Union[Artifact, _Mapping]] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class GetArtifactRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class GetArtifactResponse(_message.Message):
    __slots__ = ("size_bytes", "chunk")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    chunk: bytes
    def __init__(self, size_bytes: _Optional[int] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ModelFile(_message.Message):
    __slots__ = ("path", "sha256", "size_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    sha256: str
    size_bytes: int
    def __init__(self, path: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("name", "version", "files", "content_digest", "created_at", "labels", "aliases", "tenant")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    files: _containers.RepeatedCompositeFieldContainer[ModelFile]
    content_digest: str
    created_at: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    aliases: _containers.RepeatedScalarFieldContainer[str]
    tenant: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., files: _Optional[_Iterable[_Union[ModelFile, _Mapping]]] = ..., content_digest: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., aliases: _Optional[_Iterable[str]] = ..., tenant: _Optional[str] = ...) -> None: ...

class RegisterModelRequest(_message.Message):
    __slots__ = ("model", "others")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    others: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., others: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class RegisterModelResponse(_message.Message):
    __slots__ = ("model", "existed", "others")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    existed: bool
    others: _containers.RepeatedCompositeFieldContainer[RegisterModelResponse]
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., existed: _Optional[bool] = ..., others: _Optional[_Iterable[_Union[RegisterModelResponse, _Mapping]]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class RemoveModelRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RemoveModelResponse(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, removed: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    version: int
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ...) -> None: ...

class WatchModelsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WatchModelsResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, snapshot: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("job_id", "outcome", "model_name", "model_version", "response", "code", "message", "attempt", "lease_id", "tenant", "submitted_at", "recorded_at", "instance", "labels", "removed_at", "answer_removed_at", "generation", "answer_lost")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[Result.Outcome]
        OUTCOME_SUCCEEDED: _ClassVar[Result.Outcome]
        OUTCOME_FAILED: _ClassVar[Result.Outcome]
        OUTCOME_CANCELLED: _ClassVar[Result.Outcome]
        OUTCOME_EXPIRED: _ClassVar[Result.Outcome]
    OUTCOME_UNSPECIFIED: Result.Outcome
    OUTCOME_SUCCEEDED: Result.Outcome
    OUTCOME_FAILED: Result.Outcome
    OUTCOME_CANCELLED: Result.Outcome
    OUTCOME_EXPIRED: Result.Outcome
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    RECORDED_AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_AT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_REMOVED_AT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ANSWER_LOST_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    outcome: Result.Outcome
    model_name: str
    model_version: str
    response: _inference_pb2.ModelInferResponse
    code: int
    message: str
    attempt: int
    lease_id: str
    tenant: str
    submitted_at: _timestamp_pb2.Timestamp
    recorded_at: _timestamp_pb2.Timestamp
    instance: str
    labels: _containers.ScalarMap[str, str]
    removed_at: _timestamp_pb2.Timestamp
    answer_removed_at: _timestamp_pb2.Timestamp
    generation: int
    answer_lost: str
    def __init__(self, job_id: _Optional[str] = ..., outcome: _Optional[_Union[Result.Outcome, str]] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., response: _Optional[_Union[_inference_pb2.ModelInferResponse, _Mapping]] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., attempt: _Optional[int] = ..., lease_id: _Optional[str] = ..., tenant: _Optional[str] = ..., submitted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., recorded_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., instance: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., removed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., answer_removed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., generation: _Optional[int] = ..., answer_lost: _Optional[str] = ...) -> None: ...

class PutResultsRequest(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...

class PutResultsResponse(_message.Message):
    __slots__ = ("entries",)
    class Entry(_message.Message):
        __slots__ = ("job_id", "recorded", "standing")
        JOB_ID_FIELD_NUMBER: _ClassVar[int]
        RECORDED_FIELD_NUMBER: _ClassVar[int]
        STANDING_FIELD_NUMBER: _ClassVar[int]
        job_id: str
        recorded: bool
        standing: Result
        def __init__(self, job_id: _Optional[str] = ..., recorded: _Optional[bool] = ..., standing: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[PutResultsResponse.Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[PutResultsResponse.Entry, _Mapping]]] = ...) -> None: ...

class GetResultRequest(_message.Message):
    __slots__ = ("job_id", "wait")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    wait: _duration_pb2.Duration
    def __init__(self, job_id: _Optional[str] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetResultResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: Result
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class QueryResultsRequest(_message.Message):
    __slots__ = ("job_ids", "model_name", "model_version", "tenant", "outcome", "since", "until", "page_size", "page_token", "omit_response", "labels", "include_removed")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    OMIT_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_REMOVED_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    model_name: str
    model_version: str
    tenant: str
    outcome: Result.Outcome
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    page_size: int
    page_token: str
    omit_response: bool
    labels: _containers.ScalarMap[str, str]
    include_removed: bool
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., tenant: _Optional[str] = ..., outcome: _Optional[_Union[Result.Outcome, str]] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., omit_response: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ..., include_removed: _Optional[bool] = ...) -> None: ...

class QueryResultsResponse(_message.Message):
    __slots__ = ("results", "next_page_token")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    next_page_token: str
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchResultsRequest(_message.Message):
    __slots__ = ("model_name", "tenant", "resume_token", "omit_response")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    OMIT_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    tenant: str
    resume_token: str
    omit_response: bool
    def __init__(self, model_name: _Optional[str] = ..., tenant: _Optional[str] = ..., resume_token: _Optional[str] = ..., omit_response: _Optional[bool] = ...) -> None: ...

class WatchResultsResponse(_message.Message):
    __slots__ = ("result", "resume_token")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    result: Result
    resume_token: str
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...

class ResultFilter(_message.Message):
    __slots__ = ("job_ids", "model_name", "model_version", "tenant", "outcome", "since", "until", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    model_name: str
    model_version: str
    tenant: str
    outcome: Result.Outcome
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    def __init__(self, job_ids: _Optional[_Iterable[str]] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., tenant: _Optional[str] = ..., outcome: _Optional[_Union[Result.Outcome, str]] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class StreamResultsRequest(_message.Message):
    __slots__ = ("filter", "cursor", "omit_response", "want_watch_token")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    OMIT_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    WANT_WATCH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    filter: ResultFilter
    cursor: str
    omit_response: bool
    want_watch_token: bool
    def __init__(self, filter: _Optional[_Union[ResultFilter, _Mapping]] = ..., cursor: _Optional[str] = ..., omit_response: _Optional[bool] = ..., want_watch_token: _Optional[bool] = ...) -> None: ...

class StreamResultsResponse(_message.Message):
    __slots__ = ("results", "cursor", "watch_token", "complete")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    WATCH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    cursor: str
    watch_token: str
    complete: bool
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., cursor: _Optional[str] = ..., watch_token: _Optional[str] = ..., complete: _Optional[bool] = ...) -> None: ...

class ExportResultsRequest(_message.Message):
    __slots__ = ("filter", "url", "cursor", "omit_response", "part_rows")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    OMIT_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    PART_ROWS_FIELD_NUMBER: _ClassVar[int]
    filter: ResultFilter
    url: str
    cursor: str
    omit_response: bool
    part_rows: int
    def __init__(self, filter: _Optional[_Union[ResultFilter, _Mapping]] = ..., url: _Optional[str] = ..., cursor: _Optional[str] = ..., omit_response: _Optional[bool] = ..., part_rows: _Optional[int] = ...) -> None: ...

class ExportResultsResponse(_message.Message):
    __slots__ = ("rows", "bytes", "parts", "cursor", "file", "file_bytes", "offset", "chunk", "complete", "answers_lost")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_LOST_FIELD_NUMBER: _ClassVar[int]
    rows: int
    bytes: int
    parts: int
    cursor: str
    file: str
    file_bytes: int
    offset: int
    chunk: bytes
    complete: bool
    answers_lost: int
    def __init__(self, rows: _Optional[int] = ..., bytes: _Optional[int] = ..., parts: _Optional[int] = ..., cursor: _Optional[str] = ..., file: _Optional[str] = ..., file_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., chunk: _Optional[bytes] = ..., complete: _Optional[bool] = ..., answers_lost: _Optional[int] = ...) -> None: ...

class RetentionRule(_message.Message):
    __slots__ = ("collection", "tenant", "keep", "updated_at")
    class Collection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        COLLECTION_UNSPECIFIED: _ClassVar[RetentionRule.Collection]
        COLLECTION_RESULTS: _ClassVar[RetentionRule.Collection]
        COLLECTION_ANSWERS: _ClassVar[RetentionRule.Collection]
        COLLECTION_TOMBSTONES: _ClassVar[RetentionRule.Collection]
    COLLECTION_UNSPECIFIED: RetentionRule.Collection
    COLLECTION_RESULTS: RetentionRule.Collection
    COLLECTION_ANSWERS: RetentionRule.Collection
    COLLECTION_TOMBSTONES: RetentionRule.Collection
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    collection: RetentionRule.Collection
    tenant: str
    keep: _duration_pb2.Duration
    updated_at: _timestamp_pb2.Timestamp
    def __init__(self, collection: _Optional[_Union[RetentionRule.Collection, str]] = ..., tenant: _Optional[str] = ..., keep: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., updated_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SetRetentionRequest(_message.Message):
    __slots__ = ("rule", "remove")
    RULE_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    rule: RetentionRule
    remove: bool
    def __init__(self, rule: _Optional[_Union[RetentionRule, _Mapping]] = ..., remove: _Optional[bool] = ...) -> None: ...

class SetRetentionResponse(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[RetentionRule]
    def __init__(self, rules: _Optional[_Iterable[_Union[RetentionRule, _Mapping]]] = ...) -> None: ...

class ListRetentionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRetentionResponse(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[RetentionRule]
    def __init__(self, rules: _Optional[_Iterable[_Union[RetentionRule, _Mapping]]] = ...) -> None: ...

class ApplyRetentionRequest(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: int
    def __init__(self, token: _Optional[int] = ...) -> None: ...

class ApplyRetentionResponse(_message.Message):
    __slots__ = ("results", "answers", "tombstones", "more")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    TOMBSTONES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    results: int
    answers: int
    tombstones: int
    more: bool
    def __init__(self, results: _Optional[int] = ..., answers: _Optional[int] = ..., tombstones: _Optional[int] = ..., more: _Optional[bool] = ...) -> None: ...

class SetQuotaRequest(_message.Message):
    __slots__ = ("tenant", "bytes", "remove")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    bytes: int
    remove: bool
    def __init__(self, tenant: _Optional[str] = ..., bytes: _Optional[int] = ..., remove: _Optional[bool] = ...) -> None: ...

class SetQuotaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListUsageRequest(_message.Message):
    __slots__ = ("over_quota", "recount", "page_size", "page_token")
    OVER_QUOTA_FIELD_NUMBER: _ClassVar[int]
    RECOUNT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    over_quota: bool
    recount: bool
    page_size: int
    page_token: str
    def __init__(self, over_quota: _Optional[bool] = ..., recount: _Optional[bool] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class TenantUsage(_message.Message):
    __slots__ = ("tenant", "results", "bytes", "quota_bytes", "recounted_at", "payloads", "payload_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECOUNTED_AT_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    results: int
    bytes: int
    quota_bytes: int
    recounted_at: _timestamp_pb2.Timestamp
    payloads: int
    payload_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., results: _Optional[int] = ..., bytes: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., recounted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., payloads: _Optional[int] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class ListUsageResponse(_message.Message):
    __slots__ = ("usages", "next_page_token", "artifacts", "artifact_bytes")
    USAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_BYTES_FIELD_NUMBER: _ClassVar[int]
    usages: _containers.RepeatedCompositeFieldContainer[TenantUsage]
    next_page_token: str
    artifacts: int
    artifact_bytes: int
    def __init__(self, usages: _Optional[_Iterable[_Union[TenantUsage, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., artifacts: _Optional[int] = ..., artifact_bytes: _Optional[int] = ...) -> None: ...

class ReleaseArtifactsRequest(_message.Message):
    __slots__ = ("references",)
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    references: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, references: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseArtifactsResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...

class ListReferencesRequest(_message.Message):
    __slots__ = ("prefix", "after", "before", "page_size")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    after: str
    before: str
    page_size: int
    def __init__(self, prefix: _Optional[str] = ..., after: _Optional[str] = ..., before: _Optional[str] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListReferencesResponse(_message.Message):
    __slots__ = ("references",)
    class Reference(_message.Message):
        __slots__ = ("name", "sha256")
        NAME_FIELD_NUMBER: _ClassVar[int]
        SHA256_FIELD_NUMBER: _ClassVar[int]
        name: str
        sha256: str
        def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    references: _containers.RepeatedCompositeFieldContainer[ListReferencesResponse.Reference]
    def __init__(self, references: _Optional[_Iterable[_Union[ListReferencesResponse.Reference, _Mapping]]] = ...) -> None: ...

class VerifyStoreRequest(_message.Message):
    __slots__ = ("sizes_only",)
    SIZES_ONLY_FIELD_NUMBER: _ClassVar[int]
    sizes_only: bool
    def __init__(self, sizes_only: _Optional[bool] = ...) -> None: ...

class VerifyStoreResponse(_message.Message):
    __slots__ = ("blobs", "blobs_in_all", "bytes", "finding")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[VerifyStoreResponse.Kind]
        KIND_DAMAGED: _ClassVar[VerifyStoreResponse.Kind]
        KIND_STRAY: _ClassVar[VerifyStoreResponse.Kind]
        KIND_WHOLE_AGAIN: _ClassVar[VerifyStoreResponse.Kind]
    KIND_UNSPECIFIED: VerifyStoreResponse.Kind
    KIND_DAMAGED: VerifyStoreResponse.Kind
    KIND_STRAY: VerifyStoreResponse.Kind
    KIND_WHOLE_AGAIN: VerifyStoreResponse.Kind
    class Finding(_message.Message):
        __slots__ = ("kind", "key", "message", "sha256", "users")
        KIND_FIELD_NUMBER: _ClassVar[int]
        KEY_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        SHA256_FIELD_NUMBER: _ClassVar[int]
        USERS_FIELD_NUMBER: _ClassVar[int]
        kind: VerifyStoreResponse.Kind
        key: str
        message: str
        sha256: str
        users: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, kind: _Optional[_Union[VerifyStoreResponse.Kind, str]] = ..., key: _Optional[str] = ..., message: _Optional[str] = ..., sha256: _Optional[str] = ..., users: _Optional[_Iterable[str]] = ...) -> None: ...
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_IN_ALL_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FINDING_FIELD_NUMBER: _ClassVar[int]
    blobs: int
    blobs_in_all: int
    bytes: int
    finding: VerifyStoreResponse.Finding
    def __init__(self, blobs: _Optional[int] = ..., blobs_in_all: _Optional[int] = ..., bytes: _Optional[int] = ..., finding: _Optional[_Union[VerifyStoreResponse.Finding, _Mapping]] = ...) -> None: ...

class CollectArtifactsRequest(_message.Message):
    __slots__ = ("strays",)
    STRAYS_FIELD_NUMBER: _ClassVar[int]
    strays: bool
    def __init__(self, strays: _Optional[bool] = ...) -> None: ...

class CollectArtifactsResponse(_message.Message):
    __slots__ = ("condemned", "collected", "removed", "strays")
    CONDEMNED_FIELD_NUMBER: _ClassVar[int]
    COLLECTED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    STRAYS_FIELD_NUMBER: _ClassVar[int]
    condemned: int
    collected: int
    removed: int
    strays: int
    def __init__(self, condemned: _Optional[int] = ..., collected: _Optional[int] = ..., removed: _Optional[int] = ..., strays: _Optional[int] = ...) -> None: ...

class BackupProgress(_message.Message):
    __slots__ = ("backup_id", "documents", "blobs", "blobs_in_all", "copied", "copied_bytes", "missing", "cluster_time", "complete", "repaired")
    BACKUP_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_IN_ALL_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_TIME_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    backup_id: str
    documents: int
    blobs: int
    blobs_in_all: int
    copied: int
    copied_bytes: int
    missing: _containers.RepeatedScalarFieldContainer[str]
    cluster_time: str
    complete: bool
    repaired: int
    def __init__(self, backup_id: _Optional[str] = ..., documents: _Optional[int] = ..., blobs: _Optional[int] = ..., blobs_in_all: _Optional[int] = ..., copied: _Optional[int] = ..., copied_bytes: _Optional[int] = ..., missing: _Optional[_Iterable[str]] = ..., cluster_time: _Optional[str] = ..., complete: _Optional[bool] = ..., repaired: _Optional[int] = ...) -> None: ...

class BackUpRequest(_message.Message):
    __slots__ = ("to", "trust_sizes")
    TO_FIELD_NUMBER: _ClassVar[int]
    TRUST_SIZES_FIELD_NUMBER: _ClassVar[int]
    to: str
    trust_sizes: bool
    def __init__(self, to: _Optional[str] = ..., trust_sizes: _Optional[bool] = ...) -> None: ...

class BackUpResponse(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: BackupProgress
    def __init__(self, progress: _Optional[_Union[BackupProgress, _Mapping]] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("source", "backup_id")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BACKUP_ID_FIELD_NUMBER: _ClassVar[int]
    source: str
    backup_id: str
    def __init__(self, source: _Optional[str] = ..., backup_id: _Optional[str] = ...) -> None: ...

class RestoreResponse(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: BackupProgress
    def __init__(self, progress: _Optional[_Union[BackupProgress, _Mapping]] = ...) -> None: ...

class AuditEvent(_message.Message):
    __slots__ = ("kind", "tenant", "subject", "key", "role", "address", "rpc", "target", "code", "reason", "count", "trace_id", "origin", "of")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RPC_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    kind: str
    tenant: str
    subject: str
    key: str
    role: str
    address: str
    rpc: str
    target: str
    code: int
    reason: str
    count: int
    trace_id: str
    origin: str
    of: str
    def __init__(self, kind: _Optional[str] = ..., tenant: _Optional[str] = ..., subject: _Optional[str] = ..., key: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., rpc: _Optional[str] = ..., target: _Optional[str] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ..., trace_id: _Optional[str] = ..., origin: _Optional[str] = ..., of: _Optional[str] = ...) -> None: ...

class AuditEntry(_message.Message):
    __slots__ = ("id", "at", "event", "hash")
    ID_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    id: str
    at: _timestamp_pb2.Timestamp
    event: AuditEvent
    hash: str
    def __init__(self, id: _Optional[str] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., event: _Optional[_Union[AuditEvent, _Mapping]] = ..., hash: _Optional[str] = ...) -> None: ...

class RecordAuditRequest(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[AuditEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[AuditEvent, _Mapping]]] = ...) -> None: ...

class RecordAuditResponse(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class StreamAuditRequest(_message.Message):
    __slots__ = ("kinds", "tenant", "subject", "since", "until", "newest_first", "limit")
    KINDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIRST_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    tenant: str
    subject: str
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    newest_first: bool
    limit: int
    def __init__(self, kinds: _Optional[_Iterable[str]] = ..., tenant: _Optional[str] = ..., subject: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., newest_first: _Optional[bool] = ..., limit: _Optional[int] = ...) -> None: ...

class StreamAuditResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[AuditEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[AuditEntry, _Mapping]]] = ...) -> None: ...

class VerifyAuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyAuditResponse(_message.Message):
    __slots__ = ("entries", "anchors", "problems", "complete")
    class Problem(_message.Message):
        __slots__ = ("where", "message")
        WHERE_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        where: str
        message: str
        def __init__(self, where: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    entries: int
    anchors: int
    problems: _containers.RepeatedCompositeFieldContainer[VerifyAuditResponse.Problem]
    complete: bool
    def __init__(self, entries: _Optional[int] = ..., anchors: _Optional[int] = ..., problems: _Optional[_Iterable[_Union[VerifyAuditResponse.Problem, _Mapping]]] = ..., complete: _Optional[bool] = ...) -> None: ...
