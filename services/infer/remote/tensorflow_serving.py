"""Dialect of TensorFlow Serving: `tensorflow.serving.PredictionService`, with the signature of a SavedModel.

GetModelMetadata has the inputs and outputs, but no batch dimension. As for a model file, a batch dimension is guessed
where all first dimensions vary, and verified by a trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf import wrappers_pb2

from services.infer.error_text import listed, quoted
from services.infer.remote import tensorflow_tensors
from services.infer.remote.connection import parsed
from services.infer.remote.dialect import MetadataCall, MetadataCalls, RemoteModelInfo, missing
from services.infer.remote.errors import NotServable
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import InvalidArgument
from shoal.remote.v1 import tensorflow_serving_pb2 as pb

_SERVICE = "/tensorflow.serving.PredictionService/"
_SIGNATURES = "signature_def"
_INPUTS = pb.TensorFlowPredictRequest.DESCRIPTOR.fields_by_name["inputs"].number


class TensorFlowServing:
    """Dialect of TensorFlow Serving. Implements dialect.Dialect."""

    method = _SERVICE + "Predict"
    batches = True
    fault_text = ""

    def __init__(self, settings: RemoteSettings) -> None:
        version = wrappers_pb2.Int64Value(value=int(settings.version)) if settings.version else None
        self._model = pb.TensorFlowModel(name=settings.model, version=version, signature_name=settings.signature_name)

    def model_info(self) -> MetadataCalls:
        # Recent servers reject a request with a signature's name, and the response has all signatures.
        model = pb.TensorFlowModel(name=self._model.name)
        if self._model.HasField("version"):
            model.version.CopyFrom(self._model.version)
        request = pb.TensorFlowMetadataRequest(model_spec=model, metadata_field=[_SIGNATURES])
        response = yield MetadataCall(_SERVICE + "GetModelMetadata", request, pb.TensorFlowMetadataResponse)
        present = parsed(response.metadata[_SIGNATURES].value, pb.TensorFlowSignatures).signature_def
        name = self._model.signature_name
        if name not in present:
            raise NotServable(
                f"the remote model {quoted(model.name)} has no signature {quoted(name)}: it has "
                f"{listed(sorted(present)) or 'none'}; choose one with parameter signature_name"
            )
        return RemoteModelInfo(_specs("input", present[name].inputs), _specs("output", present[name].outputs))

    def request(
        self, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Sequence[Tensor]], outputs: Sequence[str]
    ) -> Pieces:
        pieces = Pieces(pb.TensorFlowPredictRequest(model_spec=self._model).SerializeToString())
        for name, arrays in inputs.items():
            pieces.add_entry(_INPUTS, name, tensorflow_tensors.to_message(arrays, specs[name].datatype))
        pieces.append(pb.TensorFlowPredictRequest(output_filter=outputs).SerializeToString())
        return pieces

    def parse_response(self, data: bytes, outputs: Sequence[TensorSpec]) -> list[Tensor]:
        present = parsed(data, pb.TensorFlowPredictResponse).outputs
        try:
            return [_tensor(present, spec) for spec in outputs]
        except InvalidArgument as err:
            raise ModelFailed(f"the remote server's response: {err.message}") from err


def _tensor(present: Mapping[str, pb.TensorFlowTensor], spec: TensorSpec) -> Tensor:
    if spec.name not in present:
        raise missing(spec.name, sorted(present))
    return tensorflow_tensors.from_message(present[spec.name], spec, f"output {quoted(spec.name)}")


def _specs(role: str, infos: Mapping[str, pb.TensorFlowTensorInfo]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(role, name, infos[name]) for name in sorted(infos))


def _spec(role: str, name: str, info: pb.TensorFlowTensorInfo) -> TensorSpec:
    what = f"{role} {quoted(name)} of the remote model"
    if not info.name:
        raise NotServable(f"{what} is sparse or made of several tensors, which requests cannot carry")
    datatype = tensorflow_tensors.datatype(info.dtype)
    if datatype is None:
        type_name = tensorflow_tensors.type_name(info.dtype)
        raise NotServable(f"{what} is of TensorFlow's type {type_name}, which requests cannot carry")
    return TensorSpec(name, datatype, tuple(dim.size for dim in info.tensor_shape.dim))
