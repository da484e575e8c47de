import datetime

from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InstanceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INSTANCE_STATE_UNSPECIFIED: _ClassVar[InstanceState]
    INSTANCE_STATE_STARTING: _ClassVar[InstanceState]
    INSTANCE_STATE_READY: _ClassVar[InstanceState]
    INSTANCE_STATE_DRAINING: _ClassVar[InstanceState]
INSTANCE_STATE_UNSPECIFIED: InstanceState
INSTANCE_STATE_STARTING: InstanceState
INSTANCE_STATE_READY: InstanceState
INSTANCE_STATE_DRAINING: InstanceState

class Instance(_message.Message):
    __slots__ = ("service", "name", "node", "address", "pid", "state", "started_at", "models", "version", "drained_by_operator")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAINED_BY_OPERATOR_FIELD_NUMBER: _ClassVar[int]
    service: str
    name: str
    node: str
    address: str
    pid: int
    state: InstanceState
    started_at: _timestamp_pb2.Timestamp
    models: _containers.RepeatedCompositeFieldContainer[ReadyModel]
    version: str
    drained_by_operator: bool
    def __init__(self, service: _Optional[str] = ..., name: _Optional[str] = ..., node: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[_Union[InstanceState, str]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ReadyModel, _Mapping]]] = ..., version: _Optional[str] = ..., drained_by_operator: _Optional[bool] = ...) -> None: ...

class ReadyModel(_message.Message):
    __slots__ = ("name", "versions", "slow_path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SLOW_PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    versions: _containers.RepeatedScalarFieldContainer[int]
    slow_path: str
    def __init__(self, name: _Optional[str] = ..., versions: _Optional[_Iterable[int]] = ..., slow_path: _Optional[str] = ...) -> None: ...

class ListInstancesRequest(_message.Message):
    __slots__ = ("service",)
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    service: str
    def __init__(self, service: _Optional[str] = ...) -> None: ...

class ListInstancesResponse(_message.Message):
    __slots__ = ("instances", "revision", "stale")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[Instance]
    revision: int
    stale: bool
    def __init__(self, instances: _Optional[_Iterable[_Union[Instance, _Mapping]]] = ..., revision: _Optional[int] = ..., stale: _Optional[bool] = ...) -> None: ...

class WatchInstancesRequest(_message.Message):
    __slots__ = ("service",)
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    service: str
    def __init__(self, service: _Optional[str] = ...) -> None: ...

class WatchInstancesResponse(_message.Message):
    __slots__ = ("instances", "revision", "stale")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[Instance]
    revision: int
    stale: bool
    def __init__(self, instances: _Optional[_Iterable[_Union[Instance, _Mapping]]] = ..., revision: _Optional[int] = ..., stale: _Optional[bool] = ...) -> None: ...

class GetLeaderRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLeaderResponse(_message.Message):
    __slots__ = ("instance", "fencing_token", "since")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    fencing_token: int
    since: _timestamp_pb2.Timestamp
    def __init__(self, instance: _Optional[str] = ..., fencing_token: _Optional[int] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class DrainInstanceRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DrainInstanceResponse(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: Instance
    def __init__(self, instance: _Optional[_Union[Instance, _Mapping]] = ...) -> None: ...

class UndrainInstanceRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UndrainInstanceResponse(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: Instance
    def __init__(self, instance: _Optional[_Union[Instance, _Mapping]] = ...) -> None: ...

class GetMeshStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMeshStatusResponse(_message.Message):
    __slots__ = ("envoys", "coord", "policy_version", "master_key")
    ENVOYS_FIELD_NUMBER: _ClassVar[int]
    COORD_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    MASTER_KEY_FIELD_NUMBER: _ClassVar[int]
    envoys: _containers.RepeatedCompositeFieldContainer[EnvoyStatus]
    coord: str
    policy_version: int
    master_key: str
    def __init__(self, envoys: _Optional[_Iterable[_Union[EnvoyStatus, _Mapping]]] = ..., coord: _Optional[str] = ..., policy_version: _Optional[int] = ..., master_key: _Optional[str] = ...) -> None: ...

class EnvoyStatus(_message.Message):
    __slots__ = ("node", "connected_at", "resources")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_AT_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    node: str
    connected_at: _timestamp_pb2.Timestamp
    resources: _containers.RepeatedCompositeFieldContainer[ResourceStatus]
    def __init__(self, node: _Optional[str] = ..., connected_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., resources: _Optional[_Iterable[_Union[ResourceStatus, _Mapping]]] = ...) -> None: ...

class ResourceStatus(_message.Message):
    __slots__ = ("type", "names", "acked_version", "nack", "at")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ACKED_VERSION_FIELD_NUMBER: _ClassVar[int]
    NACK_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    type: str
    names: _containers.RepeatedScalarFieldContainer[str]
    acked_version: str
    nack: str
    at: _timestamp_pb2.Timestamp
    def __init__(self, type: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., acked_version: _Optional[str] = ..., nack: _Optional[str] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetSpansRequest(_message.Message):
    __slots__ = ("trace", "job")
    TRACE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    trace: str
    job: str
    def __init__(self, trace: _Optional[str] = ..., job: _Optional[str] = ...) -> None: ...

class GetSpansResponse(_message.Message):
    __slots__ = ("spans", "silent", "truncated")
    SPANS_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    silent: _containers.RepeatedScalarFieldContainer[str]
    truncated: bool
    def __init__(self, spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., silent: _Optional[_Iterable[str]] = ..., truncated: _Optional[bool] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("trace", "span", "parent", "instance", "name", "start_ns", "end_ns", "error", "attributes", "links")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRACE_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    END_NS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    trace: str
    span: str
    parent: str
    instance: str
    name: str
    start_ns: int
    end_ns: int
    error: str
    attributes: _containers.ScalarMap[str, str]
    links: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, trace: _Optional[str] = ..., span: _Optional[str] = ..., parent: _Optional[str] = ..., instance: _Optional[str] = ..., name: _Optional[str] = ..., start_ns: _Optional[int] = ..., end_ns: _Optional[int] = ..., error: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ..., links: _Optional[_Iterable[str]] = ...) -> None: ...

class ListSpansRequest(_message.Message):
    __slots__ = ("trace", "job", "tenant")
    TRACE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    trace: str
    job: str
    tenant: str
    def __init__(self, trace: _Optional[str] = ..., job: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class ListSpansResponse(_message.Message):
    __slots__ = ("spans", "truncated")
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    truncated: bool
    def __init__(self, spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., truncated: _Optional[bool] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("by", "seconds", "points", "forwarded")
    BY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    FORWARDED_FIELD_NUMBER: _ClassVar[int]
    by: str
    seconds: float
    points: int
    forwarded: bool
    def __init__(self, by: _Optional[str] = ..., seconds: _Optional[float] = ..., points: _Optional[int] = ..., forwarded: _Optional[bool] = ...) -> None: ...

class GetHistoryResponse(_message.Message):
    __slots__ = ("coord", "since", "until", "step_seconds", "rows", "nodes", "left_out")
    COORD_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    coord: str
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    step_seconds: float
    rows: _containers.RepeatedCompositeFieldContainer[HistoryRow]
    nodes: _containers.RepeatedCompositeFieldContainer[HistoryNode]
    left_out: int
    def __init__(self, coord: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., step_seconds: _Optional[float] = ..., rows: _Optional[_Iterable[_Union[HistoryRow, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[HistoryNode, _Mapping]]] = ..., left_out: _Optional[int] = ...) -> None: ...

class HistoryRow(_message.Message):
    __slots__ = ("name", "rate", "errors", "p50_ms", "p99_ms", "batch", "queue", "queue_age_s", "shed", "cpu", "memory_bytes", "stalls")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    SHED_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALLS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rate: _containers.RepeatedScalarFieldContainer[float]
    errors: _containers.RepeatedScalarFieldContainer[float]
    p50_ms: _containers.RepeatedScalarFieldContainer[float]
    p99_ms: _containers.RepeatedScalarFieldContainer[float]
    batch: _containers.RepeatedScalarFieldContainer[float]
    queue: _containers.RepeatedScalarFieldContainer[float]
    queue_age_s: _containers.RepeatedScalarFieldContainer[float]
    shed: _containers.RepeatedScalarFieldContainer[float]
    cpu: _containers.RepeatedScalarFieldContainer[float]
    memory_bytes: _containers.RepeatedScalarFieldContainer[float]
    stalls: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., rate: _Optional[_Iterable[float]] = ..., errors: _Optional[_Iterable[float]] = ..., p50_ms: _Optional[_Iterable[float]] = ..., p99_ms: _Optional[_Iterable[float]] = ..., batch: _Optional[_Iterable[float]] = ..., queue: _Optional[_Iterable[float]] = ..., queue_age_s: _Optional[_Iterable[float]] = ..., shed: _Optional[_Iterable[float]] = ..., cpu: _Optional[_Iterable[float]] = ..., memory_bytes: _Optional[_Iterable[float]] = ..., stalls: _Optional[_Iterable[float]] = ...) -> None: ...

class HistoryNode(_message.Message):
    __slots__ = ("name", "address", "answered_at", "missing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_AT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    answered_at: _timestamp_pb2.Timestamp
    missing: bool
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., answered_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., missing: _Optional[bool] = ...) -> None: ...
