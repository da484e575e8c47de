from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import wrappers_pb2 as _wrappers_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorFlowType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DT_INVALID: _ClassVar[TensorFlowType]
    DT_FLOAT: _ClassVar[TensorFlowType]
    DT_DOUBLE: _ClassVar[TensorFlowType]
    DT_INT32: _ClassVar[TensorFlowType]
    DT_UINT8: _ClassVar[TensorFlowType]
    DT_INT16: _ClassVar[TensorFlowType]
    DT_INT8: _ClassVar[TensorFlowType]
    DT_STRING: _ClassVar[TensorFlowType]
    DT_INT64: _ClassVar[TensorFlowType]
    DT_BOOL: _ClassVar[TensorFlowType]
    DT_BFLOAT16: _ClassVar[TensorFlowType]
    DT_UINT16: _ClassVar[TensorFlowType]
    DT_HALF: _ClassVar[TensorFlowType]
    DT_UINT32: _ClassVar[TensorFlowType]
    DT_UINT64: _ClassVar[TensorFlowType]
DT_INVALID: TensorFlowType
DT_FLOAT: TensorFlowType
DT_DOUBLE: TensorFlowType
DT_INT32: TensorFlowType
DT_UINT8: TensorFlowType
DT_INT16: TensorFlowType
DT_INT8: TensorFlowType
DT_STRING: TensorFlowType
DT_INT64: TensorFlowType
DT_BOOL: TensorFlowType
DT_BFLOAT16: TensorFlowType
DT_UINT16: TensorFlowType
DT_HALF: TensorFlowType
DT_UINT32: TensorFlowType
DT_UINT64: TensorFlowType

class TensorFlowShape(_message.Message):
    __slots__ = ("dim", "unknown_rank")
    class Dim(_message.Message):
        __slots__ = ("size",)
        SIZE_FIELD_NUMBER: _ClassVar[int]
        size: int
        def __init__(self, size: _Optional[int] = ...) -> None: ...
    DIM_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_RANK_FIELD_NUMBER: _ClassVar[int]
    dim: _containers.RepeatedCompositeFieldContainer[TensorFlowShape.Dim]
    unknown_rank: bool
    def __init__(self, dim: _Optional[_Iterable[_Union[TensorFlowShape.Dim, _Mapping]]] = ..., unknown_rank: _Optional[bool] = ...) -> None: ...

class TensorFlowTensor(_message.Message):
    __slots__ = ("dtype", "tensor_shape", "tensor_content", "float_val", "double_val", "int_val", "string_val", "int64_val", "bool_val", "half_val", "uint32_val", "uint64_val")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_SHAPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_CONTENT_FIELD_NUMBER: _ClassVar[int]
    FLOAT_VAL_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_VAL_FIELD_NUMBER: _ClassVar[int]
    INT_VAL_FIELD_NUMBER: _ClassVar[int]
    STRING_VAL_FIELD_NUMBER: _ClassVar[int]
    INT64_VAL_FIELD_NUMBER: _ClassVar[int]
    BOOL_VAL_FIELD_NUMBER: _ClassVar[int]
    HALF_VAL_FIELD_NUMBER: _ClassVar[int]
    UINT32_VAL_FIELD_NUMBER: _ClassVar[int]
    UINT64_VAL_FIELD_NUMBER: _ClassVar[int]
    dtype: TensorFlowType
    tensor_shape: TensorFlowShape
    tensor_content: bytes
    float_val: _containers.RepeatedScalarFieldContainer[float]
    double_val: _containers.RepeatedScalarFieldContainer[float]
    int_val: _containers.RepeatedScalarFieldContainer[int]
    string_val: _containers.RepeatedScalarFieldContainer[bytes]
    int64_val: _containers.RepeatedScalarFieldContainer[int]
    bool_val: _containers.RepeatedScalarFieldContainer[bool]
    half_val: _containers.RepeatedScalarFieldContainer[int]
    uint32_val: _containers.RepeatedScalarFieldContainer[int]
    uint64_val: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[TensorFlowType, str]] = ..., tensor_shape: _Optional[_Union[TensorFlowShape, _Mapping]] = ..., tensor_content: _Optional[bytes] = ..., float_val: _Optional[_Iterable[float]] = ..., double_val: _Optional[_Iterable[float]] = ..., int_val: _Optional[_Iterable[int]] = ..., string_val: _Optional[_Iterable[bytes]] = ..., int64_val: _Optional[_Iterable[int]] = ..., bool_val: _Optional[_Iterable[bool]] = ..., half_val: _Optional[_Iterable[int]] = ..., uint32_val: _Optional[_Iterable[int]] = ..., uint64_val: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorFlowModel(_message.Message):
    __slots__ = ("name", "version", "signature_name")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: _wrappers_pb2.Int64Value
    signature_name: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[_Union[_wrappers_pb2.Int64Value, _Mapping]] = ..., signature_name: _Optional[str] = ...) -> None: ...

class TensorFlowPredictRequest(_message.Message):
    __slots__ = ("model_spec", "inputs", "output_filter")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TensorFlowTensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TensorFlowTensor, _Mapping]] = ...) -> None: ...
    MODEL_SPEC_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FILTER_FIELD_NUMBER: _ClassVar[int]
    model_spec: TensorFlowModel
    inputs: _containers.MessageMap[str, TensorFlowTensor]
    output_filter: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_spec: _Optional[_Union[TensorFlowModel, _Mapping]] = ..., inputs: _Optional[_Mapping[str, TensorFlowTensor]] = ..., output_filter: _Optional[_Iterable[str]] = ...) -> None: ...

class TensorFlowPredictResponse(_message.Message):
    __slots__ = ("outputs", "model_spec")
    class OutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TensorFlowTensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TensorFlowTensor, _Mapping]] = ...) -> None: ...
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_SPEC_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.MessageMap[str, TensorFlowTensor]
    model_spec: TensorFlowModel
    def __init__(self, outputs: _Optional[_Mapping[str, TensorFlowTensor]] = ..., model_spec: _Optional[_Union[TensorFlowModel, _Mapping]] = ...) -> None: ...

class TensorFlowMetadataRequest(_message.Message):
    __slots__ = ("model_spec", "metadata_field")
    MODEL_SPEC_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_FIELD_NUMBER: _ClassVar[int]
    model_spec: TensorFlowModel
    metadata_field: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_spec: _Optional[_Union[TensorFlowModel, _Mapping]] = ..., metadata_field: _Optional[_Iterable[str]] = ...) -> None: ...

class TensorFlowMetadataResponse(_message.Message):
    __slots__ = ("model_spec", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _any_pb2.Any
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_any_pb2.Any, _Mapping]] = ...) -> None: ...
    MODEL_SPEC_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    model_spec: TensorFlowModel
    metadata: _containers.MessageMap[str, _any_pb2.Any]
    def __init__(self, model_spec: _Optional[_Union[TensorFlowModel, _Mapping]] = ..., metadata: _Optional[_Mapping[str, _any_pb2.Any]] = ...) -> None: ...

class TensorFlowSignatures(_message.Message):
    __slots__ = ("signature_def",)
    class SignatureDefEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TensorFlowSignature
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TensorFlowSignature, _Mapping]] = ...) -> None: ...
    SIGNATURE_DEF_FIELD_NUMBER: _ClassVar[int]
    signature_def: _containers.MessageMap[str, TensorFlowSignature]
    def __init__(self, signature_def: _Optional[_Mapping[str, TensorFlowSignature]] = ...) -> None: ...

class TensorFlowSignature(_message.Message):
    __slots__ = ("inputs", "outputs")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TensorFlowTensorInfo
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TensorFlowTensorInfo, _Mapping]] = ...) -> None: ...
    class OutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TensorFlowTensorInfo
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TensorFlowTensorInfo, _Mapping]] = ...) -> None: ...
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.MessageMap[str, TensorFlowTensorInfo]
    outputs: _containers.MessageMap[str, TensorFlowTensorInfo]
    def __init__(self, inputs: _Optional[_Mapping[str, TensorFlowTensorInfo]] = ..., outputs: _Optional[_Mapping[str, TensorFlowTensorInfo]] = ...) -> None: ...

class TensorFlowTensorInfo(_message.Message):
    __slots__ = ("name", "dtype", "tensor_shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: TensorFlowType
    tensor_shape: TensorFlowShape
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[TensorFlowType, str]] = ..., tensor_shape: _Optional[_Union[TensorFlowShape, _Mapping]] = ...) -> None: ...
