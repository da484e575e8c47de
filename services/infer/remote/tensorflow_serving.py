"""TensorFlow Serving: `tensorflow.serving.PredictionService`, with the signature of a SavedModel.

GetModelMetadata says the inputs and outputs. It says nothing of a batch dimension: as for a file, it is guessed where
all first dimensions are free, and tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf import wrappers_pb2

from services.infer.error_text import listed, quoted
from services.infer.remote import tensorflow_tensors
from services.infer.remote.connection import parsed
from services.infer.remote.dialect import Asking, Question, RemoteModelInfo, missing
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
    """A dialect.Dialect."""

    method = _SERVICE + "Predict"
    batches = True
    fault = ""

    def __init__(self, settings: RemoteSettings) -> None:
        version = wrappers_pb2.Int64Value(value=int(settings.version)) if settings.version else None
        self._model = pb.TensorFlowModel(name=settings.model, version=version, signature_name=settings.signature_name)

    def facts(self) -> Asking:
        # A signature's name is refused here by servers of late: the answer has all of them anyway.
        model = pb.TensorFlowModel(name=self._model.name)
        if self._model.HasField("version"):
            model.version.CopyFrom(self._model.version)
        asked = pb.TensorFlowMetadataRequest(model_spec=model, metadata_field=[_SIGNATURES])
        said = yield Question(_SERVICE + "GetModelMetadata", asked, pb.TensorFlowMetadataResponse)
        there = parsed(said.metadata[_SIGNATURES].value, pb.TensorFlowSignatures).signature_def
        name = self._model.signature_name
        if name not in there:
            raise NotServable(
                f"the remote model {quoted(model.name)} has no signature {quoted(name)}: it has "
                f"{listed(sorted(there)) or 'none'}; choose one with parameter signature_name"
            )
        return RemoteModelInfo(_specs("input", there[name].inputs), _specs("output", there[name].outputs))

    def request(
        self, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Sequence[Tensor]], outputs: Sequence[str]
    ) -> Pieces:
        pieces = Pieces(pb.TensorFlowPredictRequest(model_spec=self._model).SerializeToString())
        for name, arrays in inputs.items():
            pieces.add_entry(_INPUTS, name, tensorflow_tensors.to_message(arrays, specs[name].datatype))
        pieces.append(pb.TensorFlowPredictRequest(output_filter=outputs).SerializeToString())
        return pieces

    def answer(self, data: bytes, outputs: Sequence[TensorSpec]) -> list[Tensor]:
        there = parsed(data, pb.TensorFlowPredictResponse).outputs
        try:
            return [_tensor(there, spec) for spec in outputs]
        except InvalidArgument as err:
            raise ModelFailed(f"the remote server's answer: {err.message}") from err


def _tensor(there: Mapping[str, pb.TensorFlowTensor], spec: TensorSpec) -> Tensor:
    if spec.name not in there:
        raise missing(spec.name, sorted(there))
    return tensorflow_tensors.from_message(there[spec.name], spec, f"output {quoted(spec.name)}")


def _specs(role: str, given: Mapping[str, pb.TensorFlowTensorInfo]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(role, name, given[name]) for name in sorted(given))


def _spec(role: str, name: str, info: pb.TensorFlowTensorInfo) -> TensorSpec:
    what = f"{role} {quoted(name)} of the remote model"
    if not info.name:
        raise NotServable(f"{what} is sparse or made of several tensors, which requests cannot carry")
    datatype = tensorflow_tensors.datatype(info.dtype)
    if datatype is None:
        named = tensorflow_tensors.named(info.dtype)
        raise NotServable(f"{what} is of TensorFlow's type {named}, which requests cannot carry")
    return TensorSpec(name, datatype, tuple(dim.size for dim in info.tensor_shape.dim))
