"""Dialect of the Open Inference Protocol v2: Triton, OpenVINO Model Server, MLServer, KServe's servers, another Shoal.

ModelMetadata has the inputs and outputs. ModelConfig, where the server has it, has the batch size and the optional
inputs. Tensors are sent and requested as raw bytes; a response with typed contents is read, too.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

from services.infer.error_text import quoted
from services.infer.remote.connection import parsed
from services.infer.remote.dialect import MetadataCall, MetadataCalls, RemoteModelInfo, check_shape, missing, shape_of
from services.infer.remote.errors import BatchFailed, NotServable
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces, raw
from services.infer.requests import tensors
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import InvalidArgument, Unavailable, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from shoal.oip.datatypes import BY_NAME

_SERVICE = "/inference.GRPCInferenceService/"
_RAW_INPUTS = pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number


class Oip:
    """Dialect of the Open Inference Protocol. Implements dialect.Dialect."""

    method = _SERVICE + "ModelInfer"
    batches = True
    fault_text = ""

    def __init__(self, settings: RemoteSettings) -> None:
        self._name, self._version = settings.model, settings.version

    def model_info(self) -> MetadataCalls:
        yield from self._check_ready()
        config = yield from self._config()
        if config is not None:
            self._check_config(config)
        try:
            request = pb.ModelMetadataRequest(name=self._name, version=self._version)
            metadata = yield MetadataCall(_SERVICE + "ModelMetadata", request, pb.ModelMetadataResponse)
        except BatchFailed as err:
            if not isinstance(err.error, Unimplemented):
                raise
            return RemoteModelInfo()
        optional = {tensor.name for tensor in config.input if tensor.optional} if config is not None else set()
        return RemoteModelInfo(
            tuple(replace(spec, is_optional=spec.name in optional) for spec in self._specs("input", metadata.inputs)),
            self._specs("output", metadata.outputs),
            config.max_batch_size if config is not None else None,
        )

    def _check_ready(self) -> Generator[MetadataCall, pb.ModelReadyResponse, None]:
        """Query the readiness: a server may have a model's metadata long before the model is ready.

        Raises:
            BatchFailed: the model is not ready.
        """
        request = pb.ModelReadyRequest(name=self._name, version=self._version)
        readiness = yield MetadataCall(_SERVICE + "ModelReady", request, pb.ModelReadyResponse)
        if not readiness.ready:
            version = f" version {quoted(self._version)}" if self._version else ""
            raise BatchFailed(
                Unavailable(f"the remote server says that model {quoted(self._name)}{version} is not ready")
            )

    def _config(self) -> Generator[MetadataCall, pb.ModelConfigResponse, model_config_pb2.ModelConfig | None]:
        try:
            request = pb.ModelConfigRequest(name=self._name, version=self._version)
            response = yield MetadataCall(_SERVICE + "ModelConfig", request, pb.ModelConfigResponse)
            return response.config
        except BatchFailed as err:
            if not isinstance(err.error, Unimplemented):
                raise
            return None

    def _check_config(self, config: model_config_pb2.ModelConfig) -> None:
        what = f"the remote model {quoted(self._name)}"
        if config.model_transaction_policy.decoupled:
            raise NotServable(f"{what} is decoupled: models that give one response to a request can be remote")
        if config.HasField("sequence_batching"):
            raise NotServable(f"{what} keeps state between the requests of a sequence: it cannot be remote")

    def _specs(self, role: str, tensors_: Sequence[pb.ModelMetadataResponse.TensorMetadata]) -> tuple[TensorSpec, ...]:
        for tensor in tensors_:
            if tensor.datatype not in BY_NAME:
                raise NotServable(
                    f"{role} {quoted(tensor.name)} of the remote model has the datatype {quoted(tensor.datatype)}, "
                    "which the protocol does not have"
                )
        return tuple(TensorSpec(t.name, BY_NAME[t.datatype], tuple(t.shape)) for t in tensors_)

    def request(
        self, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Sequence[Tensor]], outputs: Sequence[str]
    ) -> Pieces:
        head = pb.ModelInferRequest(model_name=self._name, model_version=self._version)
        for name, arrays in inputs.items():
            head.inputs.add(name=name, datatype=specs[name].datatype.name, shape=shape_of(arrays))
        for name in outputs:
            head.outputs.add(name=name)
        pieces = Pieces(head.SerializeToString())
        for name, arrays in inputs.items():
            pieces.add(_RAW_INPUTS, raw(arrays, specs[name].datatype))
        return pieces

    def parse_response(self, data: bytes, outputs: Sequence[TensorSpec]) -> list[Tensor]:
        response = parsed(data, pb.ModelInferResponse)
        present = {output.name: index for index, output in enumerate(response.outputs)}
        try:
            return [_tensor(response, spec, present) for spec in outputs]
        except InvalidArgument as err:
            raise ModelFailed(f"the remote server's response: {err.message}") from err


def _tensor(response: pb.ModelInferResponse, spec: TensorSpec, present: Mapping[str, int]) -> Tensor:
    if spec.name not in present:
        raise missing(spec.name, list(present))
    index = present[spec.name]
    output, what = response.outputs[index], f"output {quoted(spec.name)}"
    if output.datatype != spec.datatype.name:
        raise InvalidArgument(f"{what}: expected {spec.datatype.name}, got {quoted(output.datatype)}")
    check_shape(output.shape, spec, what)
    if index < len(response.raw_output_contents):
        return tensors.from_raw(response.raw_output_contents[index], spec.datatype, output.shape, what)
    return tensors.from_contents(output.contents, spec.datatype, output.shape, what)
