"""The application of mesh.h2 that serves REST, over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mesh.h2.headers import OVERSIZED
from mesh.h2.stream import NO_HANDLER, RequestHandler, ServerStream
from mesh.rpc.auditing import Auditing
from mesh.rpc.framing import no_memory
from mesh.rpc.grpc_app import GrpcApp
from services.infer.core import InferenceServer
from services.infer.rest import target as targets
from services.infer.rest import web_pages
from services.infer.rest.call import HTTP_STATUS, JSON, RestCall, error_body, error_fields
from services.infer.rest.fast_infer import FastRestInfer
from services.infer.rest.operations import Operations
from services.infer.rest.target import MethodNotAllowed, Target
from shoal.errors import ShoalError


class RestApp:
    """Serves `server` beside `grpc`, whose limits, threads, heavy work and access it shares."""

    def __init__(self, server: InferenceServer, grpc: GrpcApp, auditing: Auditing | None = None) -> None:
        self.methods = grpc.methods
        self.message_bytes = grpc.message_bytes
        self.clock = grpc.clock
        self.threads = grpc.threads
        self.heavy = grpc.heavy
        self.tasks = grpc.tasks
        self.access = grpc.access
        self.tracer = grpc.tracer
        self.auditing = auditing
        self.json_turn = asyncio.Lock()
        self._fast_infer = FastRestInfer(server.models)
        self._operations = Operations(server, self._fast_infer).by_name

    def operation(self, target: Target) -> Callable[[RestCall], Any]:
        """Return the coroutine function of an operation."""
        return self._operations[target.operation]

    def start_fast(self, call: RestCall, body: bytes) -> bool:
        """Start a call on the fast path, and return True; False when the call needs a task. May raise."""
        return call.target.operation == "infer" and self._fast_infer.start(call, body)

    def request(self, stream: ServerStream) -> RequestHandler:
        """Begin a call."""
        head = stream.head
        if head is OVERSIZED:
            _refuse(stream, 431, "the request has too many headers, or too large ones")
            return NO_HANDLER
        if head.path in self.methods:
            _refuse(stream, 415, "this path is a method of gRPC: its content type is application/grpc")
            return NO_HANDLER
        # With a policy, a request needs a key, which no page of others has.
        if self.access is None and (refused := web_pages.refusal(head, stream.peer[0])) is not None:
            _refuse(stream, *refused)
            return NO_HANDLER
        try:
            found = targets.read(head.method, head.path)
        except MethodNotAllowed:
            _refuse(stream, 405, "Method Not Allowed")
        except ShoalError as err:
            _refuse(stream, HTTP_STATUS[err.code], err.message)
        else:
            length = head.by_name.get(b"content-length", b"0")
            # A body that is declared as too large is not awaited.
            if length.isdigit() and int(length[:20]) > self.message_bytes:
                _refuse(stream, 413, f"a request has at most {self.message_bytes} bytes")
            else:
                return RestCall(self, stream, found)
        return NO_HANDLER

    def reject(self, stream: ServerStream) -> None:
        """Respond to a call for which there is no memory."""
        error = no_memory()
        _refuse(stream, HTTP_STATUS[error.code], error.message, str(error.retry_after_ms))


def _refuse(stream: ServerStream, status: int, message: str, retry_after_ms: str | None = None) -> None:
    body = error_body(message)
    fields = [(b"content-type", JSON), *error_fields(status, retry_after_ms), (b"content-length", b"%d" % len(body))]
    stream.respond(stream.encode_head(status, fields), body)
