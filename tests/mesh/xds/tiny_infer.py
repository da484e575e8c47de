"""A very small inference server for tests of the mesh: it says who it is and what it got.

`python tiny_infer.py SOCKET NAME`

Parameters of a request: `sleep_ms` (before the answer), `gate` (a file without which there is no answer), `fail` (a
status to end with).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from mesh.process.signals import until_stopped
from mesh.rpc.interceptors import Context
from mesh.rpc.server import Rpc, Server
from shoal.errors import Code, from_status
from shoal.inference.v2 import bulk_pb2, bulk_pb2_grpc
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc


class TinyInfer(pb_grpc.GRPCInferenceServiceServicer):
    def __init__(self, name: str) -> None:
        self._name = name

    async def ModelInfer(self, request: pb.ModelInferRequest, ctx: Context) -> pb.ModelInferResponse:
        if "sleep_ms" in request.parameters:
            await asyncio.sleep(request.parameters["sleep_ms"].int64_param / 1000)
        if "gate" in request.parameters:
            gate = Path(request.parameters["gate"].string_param)
            while not gate.exists():
                await asyncio.sleep(0.01)
        if "fail" in request.parameters:
            raise from_status(Code[request.parameters["fail"].string_param], "as you wished")
        response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        metadata = dict(ctx.invocation_metadata() or ())
        told: dict[str, Any] = {
            "replica": self._name,
            "header": metadata.get("x-shoal-model", ""),
            "sequence": metadata.get("x-shoal-sequence", ""),
            "attempt": metadata.get("x-envoy-attempt-count", ""),
            "traceparent": metadata.get("traceparent", ""),
        }
        for key, value in told.items():
            response.parameters[key].string_param = str(value)
        response.parameters["bytes"].int64_param = sum(len(raw) for raw in request.raw_input_contents)
        if "echo" in request.parameters:
            response.raw_output_contents.extend(request.raw_input_contents)
        return response

    async def ModelReady(self, request: pb.ModelReadyRequest, ctx: Context) -> pb.ModelReadyResponse:
        metadata = dict(ctx.invocation_metadata() or ())
        return pb.ModelReadyResponse(ready=metadata.get("x-shoal-model") == request.name)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, ctx: Context) -> pb.ModelMetadataResponse:
        metadata = dict(ctx.invocation_metadata() or ())
        return pb.ModelMetadataResponse(name=request.name, platform=str(metadata.get("x-shoal-model", "")))

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], ctx: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async for request in request_iterator:
            yield pb.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, ctx))


class TinyBulk(bulk_pb2_grpc.BulkInferenceServicer):
    def __init__(self, name: str) -> None:
        self._name = name

    async def InferBulk(
        self, request_iterator: AsyncIterator[bulk_pb2.InferBulkRequest], ctx: Context
    ) -> AsyncIterator[bulk_pb2.InferBulkResponse]:
        """Says which model the call was routed by, and then what is given up."""
        header = dict(ctx.invocation_metadata() or ()).get("x-shoal-model", "")
        async for request in request_iterator:
            answers = [bulk_pb2.InferBulkResponse.Answer(number=n, message=str(header)) for n in request.given_up]
            answers += [
                bulk_pb2.InferBulkResponse.Answer(number=e.number, message=str(header)) for e in request.entries
            ]
            yield bulk_pb2.InferBulkResponse(answers=answers, instance=self._name)


async def main(socket: str, name: str) -> None:
    descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    servicer = TinyInfer(name)
    rpc = Rpc(descriptor, lambda server: pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server))
    bulk = Rpc(
        bulk_pb2.DESCRIPTOR.services_by_name["BulkInference"],
        lambda server: bulk_pb2_grpc.add_BulkInferenceServicer_to_server(TinyBulk(name), server),
    )
    async with Server(f"unix:{socket}", [rpc, bulk], drain_ms=2_000) as server:
        await server.serve()
        await until_stopped()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
