"""Errors of calls, and the translation of HTTP and HTTP/2 errors to gRPC statuses.

Mappings: the gRPC documents http-grpc-status-mapping.md, and PROTOCOL-HTTP2.md, "Errors".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

import grpc

from mesh.h2.frames import Reason
from mesh.h2.headers import Block
from mesh.rpc import status
from shoal.errors import InvalidArgument

S = grpc.StatusCode

_BY_NUMBER = {code.value[0]: code for code in S}
_BY_HTTP = {
    400: S.INTERNAL,
    401: S.UNAUTHENTICATED,
    403: S.PERMISSION_DENIED,
    404: S.UNIMPLEMENTED,
    429: S.UNAVAILABLE,
    502: S.UNAVAILABLE,
    503: S.UNAVAILABLE,
    504: S.UNAVAILABLE,
}
_BY_REASON = {
    Reason.REFUSED_STREAM: S.UNAVAILABLE,
    Reason.CANCEL: S.CANCELLED,
    Reason.ENHANCE_YOUR_CALM: S.RESOURCE_EXHAUSTED,
    # INADEQUATE_SECURITY
    12: S.PERMISSION_DENIED,
}


class CallFailed(grpc.aio.AioRpcError):
    """A call of this client has failed. A subclass of grpc.aio's error, for callers that catch those.

    `is_unprocessed`: certainly, no server has begun to process the call. `is_from_peer`: the peer has sent the status
    and its text.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing: Iterable[tuple[str, str | bytes]] = (),
        *,
        is_unprocessed: bool = False,
        is_from_peer: bool = False,
    ) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
        self.is_unprocessed = is_unprocessed
        self.is_from_peer = is_from_peer

    def __reduce__(self) -> tuple[Any, ...]:
        trailing = tuple(self.trailing_metadata() or ())
        return _restored, (self.code(), self.details() or "", trailing, self.is_unprocessed, self.is_from_peer)


def _restored(
    code: grpc.StatusCode, details: str, trailing: Any, is_unprocessed: bool, is_from_peer: bool
) -> CallFailed:
    return CallFailed(code, details, trailing, is_unprocessed=is_unprocessed, is_from_peer=is_from_peer)


def of_trailers(block: Block) -> CallFailed | None:
    """Return the failure in a response's trailers; None for grpc-status 0."""
    status_text = block.by_name.get(b"grpc-status")
    if status_text == b"0":
        return None
    if status_text is None:
        return CallFailed(S.UNKNOWN, "the response ended without a grpc-status")
    code = _BY_NUMBER.get(int(status_text), S.UNKNOWN) if status_text.isdigit() and len(status_text) < 5 else S.UNKNOWN
    message = unquote_to_bytes(block.by_name.get(b"grpc-message", b"")).decode("utf-8", "replace")
    return CallFailed(code, message, _metadata(block), is_from_peer=True)


def of_head(block: Block) -> CallFailed | None:
    """Return the failure in a response's head: a response without messages, or one that is not gRPC."""
    http = block.by_name.get(b":status", b"")
    if b"grpc-status" in block.by_name:
        return of_trailers(block)
    if http != b"200":
        number = int(http) if http.isdigit() and len(http) == 3 else 0
        text = f"Received http2 header with status: {http.decode('latin-1')}"
        return CallFailed(_BY_HTTP.get(number, S.UNKNOWN), text, _metadata(block))
    kind = block.by_name.get(b"content-type", b"none").decode("latin-1")
    return CallFailed(S.UNKNOWN, f"the response is not gRPC's: content-type {kind}, and no grpc-status")


def is_grpc_head(block: Block) -> bool:
    """Return True for the head of a gRPC response that has more to come."""
    fields = block.by_name
    return fields.get(b":status") == b"200" and fields.get(b"content-type", b"").startswith(b"application/grpc")


def of_reset(reason: int) -> CallFailed:
    """Return the failure of a call whose stream the peer has reset."""
    is_refused = reason == Reason.REFUSED_STREAM
    code = _BY_REASON.get(reason, S.INTERNAL)
    return CallFailed(code, f"Received RST_STREAM with error code {reason}", is_unprocessed=is_refused)


def _metadata(block: Block) -> Iterable[tuple[str, str | bytes]]:
    try:
        return status.metadata(block.fields)
    # Invalid base64: the metadata without binary values is still useful.
    except InvalidArgument:
        return status.metadata(field for field in block.fields if not field[0].endswith(b"-bin"))
