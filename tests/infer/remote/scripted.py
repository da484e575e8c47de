"""A server of the Open Inference Protocol that does what a test says: for faults that no real one has at will.

It serves one model, x FP32 [n,4] -> y FP32 [n,4], y = 2x, at most `rows` rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import numpy as np

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc

Infer = Callable[[pb.ModelInferRequest, grpc.aio.ServicerContext], Awaitable[pb.ModelInferResponse]]


async def double(asked: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> pb.ModelInferResponse:
    """What it does when a test says nothing."""
    return response(asked, 2 * given(asked))


def given(asked: pb.ModelInferRequest) -> np.ndarray:
    return np.frombuffer(asked.raw_input_contents[0], np.float32).reshape(asked.inputs[0].shape)


def response(asked: pb.ModelInferRequest, y: np.ndarray, datatype: str = "FP32") -> pb.ModelInferResponse:
    made = pb.ModelInferResponse(model_name=asked.model_name, raw_output_contents=[y.tobytes()])
    made.outputs.add(name="y", datatype=datatype, shape=y.shape)
    return made


class Scripted(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Change it while it serves."""

    def __init__(self, rows: int | None = 8) -> None:
        """`rows` None: it has no ModelConfig."""
        self.rows = rows
        self.inputs = [("x", "FP32", [-1, 4])]
        self.outputs = [("y", "FP32", [-1, 4])]
        self.config: Callable[[pb.ModelConfigResponse], object] = bool
        """May change the response of ModelConfig."""
        self.is_ready = True
        self.infer: Infer = double
        self.seen: list[int] = []
        """Rows of the requests that came."""
        self.came = asyncio.Condition()
        self.ended: list[str] = []
        """Whose calls were cancelled, by the first number in them."""
        self.token = ""
        """The value of `authorization` that it wants; empty: any."""
        self.address = ""

    async def _check(self, context: grpc.aio.ServicerContext) -> None:
        if self.token and ("authorization", self.token) not in tuple(context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")

    async def ModelReady(self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext) -> object:
        await self._check(context)
        return pb.ModelReadyResponse(ready=self.is_ready)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext) -> object:
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            inputs=[tensor(name=n, datatype=d, shape=s) for n, d, s in self.inputs],
            outputs=[tensor(name=n, datatype=d, shape=s) for n, d, s in self.outputs],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: grpc.aio.ServicerContext) -> object:
        if self.rows is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no ModelConfig")
        said = pb.ModelConfigResponse()
        said.config.max_batch_size = self.rows or 0
        self.config(said)
        return said

    async def ModelInfer(self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> object:
        await self._check(context)
        async with self.came:
            self.seen.append(request.inputs[0].shape[0])
            self.came.notify_all()
        try:
            return await self.infer(request, context)
        except asyncio.CancelledError:
            async with self.came:
                self.ended.append(str(int(given(request).flat[0])))
                self.came.notify_all()
            raise

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until what came, or ended, makes it so."""
        async with self.came:
            await asyncio.wait_for(self.came.wait_for(holds), 30)

    @asynccontextmanager
    async def serving(
        self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
    ) -> AsyncIterator[Scripted]:
        """Serves until the block ends."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 27)])
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        self.address = address.replace(":0", f":{port}")
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)
