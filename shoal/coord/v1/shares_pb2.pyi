from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LimitKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIMIT_KIND_UNSPECIFIED: _ClassVar[LimitKind]
    LIMIT_KIND_REQUESTS: _ClassVar[LimitKind]
    LIMIT_KIND_IN_FLIGHT: _ClassVar[LimitKind]
    LIMIT_KIND_BYTES: _ClassVar[LimitKind]
    LIMIT_KIND_ROWS: _ClassVar[LimitKind]
LIMIT_KIND_UNSPECIFIED: LimitKind
LIMIT_KIND_REQUESTS: LimitKind
LIMIT_KIND_IN_FLIGHT: LimitKind
LIMIT_KIND_BYTES: LimitKind
LIMIT_KIND_ROWS: LimitKind

class LimitBucket(_message.Message):
    __slots__ = ("limit", "kind", "tenant", "key", "model")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    limit: str
    kind: LimitKind
    tenant: str
    key: str
    model: str
    def __init__(self, limit: _Optional[str] = ..., kind: _Optional[_Union[LimitKind, str]] = ..., tenant: _Optional[str] = ..., key: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class ShareClaim(_message.Message):
    __slots__ = ("bucket", "demand", "held")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    bucket: LimitBucket
    demand: float
    held: float
    def __init__(self, bucket: _Optional[_Union[LimitBucket, _Mapping]] = ..., demand: _Optional[float] = ..., held: _Optional[float] = ...) -> None: ...

class ClaimSharesRequest(_message.Message):
    __slots__ = ("claimant", "claims", "forwarded")
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    FORWARDED_FIELD_NUMBER: _ClassVar[int]
    claimant: str
    claims: _containers.RepeatedCompositeFieldContainer[ShareClaim]
    forwarded: bool
    def __init__(self, claimant: _Optional[str] = ..., claims: _Optional[_Iterable[_Union[ShareClaim, _Mapping]]] = ..., forwarded: _Optional[bool] = ...) -> None: ...

class GrantedShare(_message.Message):
    __slots__ = ("bucket", "amount", "burst")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    BURST_FIELD_NUMBER: _ClassVar[int]
    bucket: LimitBucket
    amount: float
    burst: float
    def __init__(self, bucket: _Optional[_Union[LimitBucket, _Mapping]] = ..., amount: _Optional[float] = ..., burst: _Optional[float] = ...) -> None: ...

class ClaimSharesResponse(_message.Message):
    __slots__ = ("shares", "renew_ms", "lifetime_ms")
    SHARES_FIELD_NUMBER: _ClassVar[int]
    RENEW_MS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_MS_FIELD_NUMBER: _ClassVar[int]
    shares: _containers.RepeatedCompositeFieldContainer[GrantedShare]
    renew_ms: int
    lifetime_ms: int
    def __init__(self, shares: _Optional[_Iterable[_Union[GrantedShare, _Mapping]]] = ..., renew_ms: _Optional[int] = ..., lifetime_ms: _Optional[int] = ...) -> None: ...
