"""The inference protocol over REST: its operations, and its fast path."""

from __future__ import annotations

from mesh.rest.app import RestApp
from mesh.rest.call import RestCall
from mesh.rpc.auditing import Auditing
from mesh.rpc.grpc_app import GrpcApp
from services.infer.core import InferenceServer
from services.infer.rest.fast_infer import FastRestInfer
from services.infer.rest.operations import Operations


class InferRestApp(RestApp):
    """Serves `server`."""

    def __init__(self, server: InferenceServer, grpc: GrpcApp, auditing: Auditing | None = None) -> None:
        self._fast_infer = FastRestInfer(server.models)
        super().__init__(grpc, Operations(server, self._fast_infer).by_name)
        self.auditing = auditing
        self.tracer = grpc.tracer

    def start_fast(self, call: RestCall, body: bytes) -> bool:
        """Start a call on the fast path, and return True; False when the call needs a task. May raise."""
        return call.target.operation == "infer" and self._fast_infer.start(call, body)
