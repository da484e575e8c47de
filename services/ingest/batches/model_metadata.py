"""Metadata of a model, read from infer through the mesh when a batch is submitted."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from mesh.rpc.channel import AnyChannel
from mesh.rpc.interceptors import translate
from services.ingest.batches.rows.signature import Signature, signature_of
from shoal.errors import Code, Unavailable
from shoal.inference.v2 import inference_pb2, inference_pb2_grpc

_TIMEOUT_S = 10.0


class ModelMetadata:
    """Client of infer's metadata methods."""

    def __init__(self, channel: AnyChannel) -> None:
        self._stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def signature(self, model: str, version: str, outputs: Sequence[str]) -> Signature:
        """Return the signature of a model.

        Raises:
            NotFound: no such model. InvalidArgument, FailedPrecondition: as `signature_of` does.
            Unavailable: no instance responds.
        """
        try:
            metadata_request = inference_pb2.ModelMetadataRequest(name=model, version=version)
            metadata = await self._stub.ModelMetadata(metadata_request, timeout=_TIMEOUT_S)
            config_request = inference_pb2.ModelConfigRequest(name=model, version=version)
            config = await self._stub.ModelConfig(config_request, timeout=_TIMEOUT_S)
        except grpc.RpcError as err:
            known = translate(err, f"reading the metadata of model {model!r}")
            if known.code is Code.UNIMPLEMENTED:
                raise Unavailable(f"the mesh has no route to infer yet ({known.message}): retry later") from err
            raise known from err
        return signature_of(metadata, config.config, outputs)
