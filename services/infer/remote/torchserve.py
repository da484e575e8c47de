"""Dialect of TorchServe: `org.pytorch.serve.grpc.inference.InferenceAPIsService`.

Each input is a bytes field of the request, the prediction is bytes. There is no metadata, and no batch: TorchServe
batches requests itself. Without `input` and `output` in its configuration, a model is `data` -> `prediction`. Both a
raising handler and a model without workers give UNAVAILABLE; only the message distinguishes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from google.protobuf.empty_pb2 import Empty

from services.infer.remote.connection import parsed
from services.infer.remote.dialect import MetadataCall, MetadataCalls, RemoteModelInfo
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from shoal.remote.v1 import torchserve_pb2 as pb

_SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
_INPUT = pb.TorchServePredictionsRequest.DESCRIPTOR.fields_by_name["input"].number


class TorchServe:
    """Dialect of TorchServe. Implements dialect.Dialect."""

    method = _SERVICE + "Predictions"
    batches = False
    fault_text = "InternalServerException"

    def __init__(self, settings: RemoteSettings) -> None:
        self._head = pb.TorchServePredictionsRequest(model_name=settings.model, model_version=settings.version)

    def model_info(self) -> MetadataCalls:
        yield MetadataCall(_SERVICE + "Ping", Empty(), pb.TorchServeHealthResponse)
        return RemoteModelInfo(max_batch_size=0)

    def request(
        self, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Sequence[Tensor]], outputs: Sequence[str]
    ) -> Pieces:
        pieces = Pieces(self._head.SerializeToString())
        for name, (array,) in inputs.items():
            pieces.add_entry(_INPUT, name, Pieces(array.item()))
        return pieces

    def parse_response(self, data: bytes, outputs: Sequence[TensorSpec]) -> list[Tensor]:
        prediction = np.empty(1, object)
        prediction[0] = parsed(data, pb.TorchServePredictionResponse).prediction
        return [prediction for _ in outputs]
