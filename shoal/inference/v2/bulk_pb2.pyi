from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InferBulkRequest(_message.Message):
    __slots__ = ("entries", "given_up")
    class Entry(_message.Message):
        __slots__ = ("number", "request", "timeout_ms", "tenant", "is_retry", "caller")
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        IS_RETRY_FIELD_NUMBER: _ClassVar[int]
        CALLER_FIELD_NUMBER: _ClassVar[int]
        number: int
        request: bytes
        timeout_ms: int
        tenant: str
        is_retry: bool
        caller: bytes
        def __init__(self, number: _Optional[int] = ..., request: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ..., tenant: _Optional[str] = ..., is_retry: _Optional[bool] = ..., caller: _Optional[bytes] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[InferBulkRequest.Entry]
    given_up: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, entries: _Optional[_Iterable[_Union[InferBulkRequest.Entry, _Mapping]]] = ..., given_up: _Optional[_Iterable[int]] = ...) -> None: ...

class InferBulkResponse(_message.Message):
    __slots__ = ("answers", "instance")
    class Answer(_message.Message):
        __slots__ = ("number", "response", "code", "message", "retry_after_ms", "is_limited")
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        RESPONSE_FIELD_NUMBER: _ClassVar[int]
        CODE_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
        IS_LIMITED_FIELD_NUMBER: _ClassVar[int]
        number: int
        response: bytes
        code: int
        message: str
        retry_after_ms: int
        is_limited: bool
        def __init__(self, number: _Optional[int] = ..., response: _Optional[bytes] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., is_limited: _Optional[bool] = ...) -> None: ...
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[InferBulkResponse.Answer]
    instance: str
    def __init__(self, answers: _Optional[_Iterable[_Union[InferBulkResponse.Answer, _Mapping]]] = ..., instance: _Optional[str] = ...) -> None: ...
