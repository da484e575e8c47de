"""Calls of this server's own handlers of gRPC by calls over REST: access, spans, audit and errors are those of gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from mesh.rest.call import RestCall
from mesh.rpc.call_context import CallContext
from shoal.errors import from_status, retry_after_of, trace_of


async def unary(call: RestCall, rpc: str, request: Message) -> Any:
    """Return the response of a unary RPC. Raises the ShoalError of its status."""
    context = call.context()
    with _raised(context):
        return await call.handler(rpc).unary_unary(request, context)


async def responses(call: RestCall, rpc: str, request: Message) -> AsyncGenerator[Any, None]:
    """Yield the responses of an RPC with a stream of responses. Raises the ShoalError of its status."""
    context = call.context()
    found = call.handler(rpc).unary_stream(request, context)
    try:
        with _raised(context):
            async for response in found:
                yield response
                del response
    finally:
        await found.aclose()


@contextmanager
def _raised(context: CallContext) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AbortError as err:
        error = from_status(*context.status, retry_after_ms=retry_after_of(context.trailing))
        error.trailing = tuple(
            (key, value) for key, value in context.trailing if key.startswith("x-ratelimit-") and isinstance(value, str)
        )
        error.trace_id = trace_of(context.trailing) or context.cause
        raise error from err
