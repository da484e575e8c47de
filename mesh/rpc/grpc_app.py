"""Method table of a gRPC server: an application of the HTTP/2 core that hands each request to its method.

fast method ──> FastCall        any other ──> SlowCall        not gRPC ──> another application, or HTTP status 415
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from mesh.h2.headers import LIST_BYTES, LIST_FIELDS, OVERSIZED, Block, response_head
from mesh.h2.stream import NO_HANDLER, Application, RequestHandler, ServerStream
from mesh.rpc import status
from mesh.rpc.access import Access
from mesh.rpc.fast_call import Deadlines, FastCall, FastHandler
from mesh.rpc.fast_spans import FastTracer
from mesh.rpc.framing import no_memory
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.limits import MESSAGE_BYTES
from mesh.rpc.message_threads import MessageThreads
from mesh.rpc.slow_call import SlowCall
from shoal.errors import Code, ShoalError, retry_metadata

_UNSUPPORTED = response_head(415, [(b"content-type", b"text/plain")])
_UNSUPPORTED_TEXT = b"this is a gRPC server: content-type application/grpc\n"
# Status 431 is HTTP's for it; gRPC clients take the gRPC status.
_OVERSIZED = response_head(
    431,
    [
        status.CONTENT_TYPE,
        *status.trailers(
            Code.RESOURCE_EXHAUSTED, f"headers of more than {LIST_BYTES} bytes, or {LIST_FIELDS} fields: send less"
        ),
    ],
)


_NO_MEMORY_ERROR = no_memory()
_NO_MEMORY = response_head(
    200,
    [
        status.CONTENT_TYPE,
        *status.trailers(_NO_MEMORY_ERROR.code, _NO_MEMORY_ERROR.message, retry_metadata(_NO_MEMORY_ERROR)),
    ],
)


class GrpcApp:
    """Serves `methods` on the slow path, and `fast_methods` on the fast path; both by path.

    A fast method is in both tables: unusual requests (no body, unusual content type or timeout) take the slow path.
    """

    def __init__(
        self,
        methods: Mapping[str, Any],
        fast_methods: Mapping[str, FastHandler],
        message_bytes: int = MESSAGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
        tracer: FastTracer | None = None,
        access: Access | None = None,
        heavy: HeavyWork | None = None,
    ) -> None:
        """`heavy` is the process's; None: only this application has heavy work."""
        self.methods = methods
        self._fast_methods = fast_methods
        self.message_bytes = message_bytes
        self.clock = clock
        self.deadlines = Deadlines(clock)
        self.threads = MessageThreads()
        self.heavy = HeavyWork() if heavy is None else heavy
        self.tracer = tracer
        self.access = access
        """Admits calls on the slow path. Fast methods admit their calls themselves."""
        self.http: Application | None = None
        """Serves requests that are not gRPC; None: there are none."""
        self.tasks: set[asyncio.Task[None]] = set()
        """Tasks of the slow calls that have not ended."""

    def request(self, stream: ServerStream) -> RequestHandler:
        """Begin a call."""
        head = stream.head
        fast = self._fast_methods.get(head.path)
        if fast is not None and not stream.is_request_ended:
            headers = head.by_name
            kind = headers.get(b"content-type")
            is_grpc = kind == b"application/grpc" or kind == b"application/grpc+proto"
            if is_grpc and headers.get(b":method") == b"POST":
                try:
                    return FastCall(self, fast, stream)
                # An invalid header: the slow path responds with the error.
                except ShoalError:
                    pass
        if head is OVERSIZED:
            stream.respond(_OVERSIZED)
            return NO_HANDLER
        if self.http is not None and not _names_grpc(head):
            return self.http.request(stream)
        if not _is_grpc(head):
            stream.respond(_UNSUPPORTED, _UNSUPPORTED_TEXT)
            return NO_HANDLER
        if head.path not in self.methods:
            stream.respond(_unknown_method(head.path))
            return NO_HANDLER
        return SlowCall(self, stream)

    def reject(self, stream: ServerStream) -> None:
        """Respond to a call for which there is no memory."""
        if self.http is not None and not _names_grpc(stream.head):
            self.http.reject(stream)
            return
        stream.respond(_NO_MEMORY)


class MethodTable:
    """Collects the handlers of servicers by path, in the place of the grpc server that generated code expects."""

    def __init__(self, wrap: Callable[[str, Any], Any]) -> None:
        """`wrap` is put around each handler."""
        self._wrap = wrap
        self.by_path: dict[str, Any] = {}

    def add(self, path: str, handler: Any) -> None:
        """Add a grpc.RpcMethodHandler."""
        self.by_path[path] = self._wrap(path, handler)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Called by generated code."""
        for name, handler in handlers.items():
            self.add(f"/{service}/{name}", handler)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Called by generated code, with the same handlers in another form: not used."""


def _unknown_method(path: str) -> bytes:
    found = status.trailers(Code.UNIMPLEMENTED, f"Method not found: this server does not implement {path}")
    return response_head(200, [status.CONTENT_TYPE, *found])


def _names_grpc(head: Block) -> bool:
    return head.by_name.get(b"content-type", b"").startswith(b"application/grpc")


def _is_grpc(head: Block) -> bool:
    content_type = head.by_name.get(b"content-type", b"")
    is_plain = content_type == b"application/grpc"
    return (is_plain or content_type.startswith((b"application/grpc+", b"application/grpc;"))) and head.method == "POST"
