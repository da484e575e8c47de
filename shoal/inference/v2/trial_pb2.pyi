from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TryModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: bytes
    def __init__(self, model: _Optional[bytes] = ...) -> None: ...

class TryModelResponse(_message.Message):
    __slots__ = ("instance", "passed", "pid")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    instance: str
    passed: bool
    pid: int
    def __init__(self, instance: _Optional[str] = ..., passed: _Optional[bool] = ..., pid: _Optional[int] = ...) -> None: ...
