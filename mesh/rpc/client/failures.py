"""What a call fails with; and what HTTP's and HTTP/2's words mean in gRPC's.

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
    12: S.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}


class CallFailed(grpc.aio.AioRpcError):
    """A call of this client has failed; to whoever catches errors of grpc.aio, it is one of those.

    `is_unprocessed`: it is certain that no server has begun with it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing: Iterable[tuple[str, str | bytes]] = (),
        *,
        is_unprocessed: bool = False,
    ) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
        self.is_unprocessed = is_unprocessed

    def __reduce__(self) -> tuple[Any, ...]:
        trailing = tuple(self.trailing_metadata() or ())
        return _again, (self.code(), self.details() or "", trailing, self.is_unprocessed)


def _again(code: grpc.StatusCode, details: str, trailing: Any, is_unprocessed: bool) -> CallFailed:
    return CallFailed(code, details, trailing, is_unprocessed=is_unprocessed)


def of_trailers(block: Block) -> CallFailed | None:
    """What a call's last headers say: None when it went well."""
    said = block.by_name.get(b"grpc-status")
    if said == b"0":
        return None
    if said is None:
        return CallFailed(S.UNKNOWN, "the answer ended without a grpc-status")
    code = _BY_NUMBER.get(int(said), S.UNKNOWN) if said.isdigit() and len(said) < 5 else S.UNKNOWN
    message = unquote_to_bytes(block.by_name.get(b"grpc-message", b"")).decode("utf-8", "replace")
    return CallFailed(code, message, _metadata(block))


def of_head(block: Block) -> CallFailed | None:
    """What headers that are no gRPC answer's, or that are all of an answer, say."""
    http = block.by_name.get(b":status", b"")
    if b"grpc-status" in block.by_name:
        return of_trailers(block)
    if http != b"200":
        number = int(http) if http.isdigit() and len(http) == 3 else 0
        text = f"Received http2 header with status: {http.decode('latin-1')}"
        return CallFailed(_BY_HTTP.get(number, S.UNKNOWN), text, _metadata(block))
    kind = block.by_name.get(b"content-type", b"none").decode("latin-1")
    return CallFailed(S.UNKNOWN, f"the answer is not gRPC's: content-type {kind}, and no grpc-status")


def is_of_grpc(block: Block) -> bool:
    """Whether these are the headers of an answer that goes on."""
    fields = block.by_name
    return fields.get(b":status") == b"200" and fields.get(b"content-type", b"").startswith(b"application/grpc")


def of_reset(reason: int) -> CallFailed:
    """What it means that the peer has reset a stream."""
    is_refused = reason == Reason.REFUSED_STREAM
    code = _BY_REASON.get(reason, S.INTERNAL)
    return CallFailed(code, f"Received RST_STREAM with error code {reason}", is_unprocessed=is_refused)


def _metadata(block: Block) -> Iterable[tuple[str, str | bytes]]:
    try:
        return status.metadata(block.fields)
    except InvalidArgument:  # Base64 that is none: the rest is worth having.
        return status.metadata(field for field in block.fields if not field[0].endswith(b"-bin"))
