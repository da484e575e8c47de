"""The application of mesh.h2 that serves REST, over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from google.protobuf.message import Message

from mesh.h2.headers import OVERSIZED
from mesh.h2.stream import NO_HANDLER, RequestHandler, ServerStream
from mesh.rest import target as targets
from mesh.rest import web_pages
from mesh.rest.call import HTTP_STATUS, JSON, RestCall, error_body, error_fields, sent_body
from mesh.rest.json_streams import JsonStream, followed
from mesh.rest.target import MethodNotAllowed, Target
from mesh.rest.tenant_lock import TenantLock
from mesh.rpc.auditing import Auditing
from mesh.rpc.fast_spans import FastTracer
from mesh.rpc.framing import no_memory
from mesh.rpc.grpc_app import GrpcApp
from shoal.errors import NotFound, ShoalError, retry_metadata

Operation = Callable[[RestCall], Any]
"""Coroutine function of an operation; it returns a Reply, or Events."""


class RestApp:
    """Serves operations beside `grpc`, whose limits, threads, heavy work and access it shares."""

    auditing: Auditing | None = None
    tracer: FastTracer | None = None
    """Traces the calls; None where the handlers of gRPC do, which the operations call."""

    def __init__(
        self,
        grpc: GrpcApp,
        operations: Mapping[str, Operation],
        *,
        rpcs: Mapping[str, str] = MappingProxyType({}),
        streams: Mapping[str, type[Message]] = MappingProxyType({}),
        message_bytes: int | None = None,
    ) -> None:
        """Store what is served.

        Args:
            operations: by their names in `shoal.access.rest_paths`.
            rpcs: RPCs that operations need in place of those of their paths, by the operation.
            streams: messages of the requests of RPCs whose streams of responses are served, by the operation.
            message_bytes: the largest body; None: as for gRPC.
        """
        self.methods = grpc.methods
        self.message_bytes = grpc.message_bytes if message_bytes is None else message_bytes
        self.clock = grpc.clock
        self.threads = grpc.threads
        self.heavy = grpc.heavy
        self.tasks = grpc.tasks
        self.access = grpc.access
        self.large_json = TenantLock()
        self._operations = {**operations, **{name: followed(message) for name, message in streams.items()}}
        self._rpcs = rpcs
        self._streams = frozenset(streams)

    def operation(self, target: Target) -> Operation:
        """Return the coroutine function of an operation."""
        return self._operations[target.operation]

    def start_fast(self, call: RestCall, body: bytes) -> bool:
        """Start a call on the fast path, and return True; False when the call needs a task. May raise."""
        return False

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
            if found.operation not in self._operations:
                raise NotFound(f"no call {targets.call_text(head.method, head.path)}")
        except MethodNotAllowed as err:
            _refuse(stream, 405, str(err), methods=err.methods)
        except ShoalError as err:
            _refuse(stream, HTTP_STATUS[err.code], err.message)
        else:
            length = head.by_name.get(b"content-length", b"0")
            # A body that is declared as too large is not awaited.
            if length.isdigit() and int(length[:20]) > self.message_bytes:
                _refuse(stream, 413, f"a request has at most {self.message_bytes} bytes")
            elif found.operation in self._streams:
                return JsonStream(self, stream, found)
            else:
                rpc = self._rpcs.get(found.operation)
                return RestCall(self, stream, found if rpc is None else replace(found, rpc=rpc))
        return NO_HANDLER

    def reject(self, stream: ServerStream) -> None:
        """Respond to a call for which there is no memory."""
        error = no_memory()
        _refuse(stream, HTTP_STATUS[error.code], error.message, retry_metadata(error))


def _refuse(
    stream: ServerStream,
    status: int,
    message: str,
    trailing: Iterable[tuple[str, str]] = (),
    methods: Sequence[str] = (),
) -> None:
    body = error_body(message)
    fields = [(b"content-type", JSON), *error_fields(status, trailing), (b"content-length", b"%d" % len(body))]
    if methods:
        fields.append((b"allow", ", ".join(methods).encode()))
    stream.respond(stream.encode_head(status, fields), sent_body(stream, body))
