"""Errors of remote calls: maps a gRPC status to its cause and to the error for the caller.

status of the remote call                                cause      handling
INVALID_ARGUMENT, OUT_OF_RANGE, FAILED_PRECONDITION      a request  the batch is bisected, that request gets the error
INTERNAL, UNKNOWN, DATA_LOSS, ABORTED, ALREADY_EXISTS    the model  the batch is bisected, the error is INTERNAL
RESOURCE_EXHAUSTED for a message that is too large       a request  the batch is bisected
RESOURCE_EXHAUSTED, UNAVAILABLE                          server     the same status, with a retry time
DEADLINE_EXCEEDED, UNIMPLEMENTED                         server     the same status
NOT_FOUND, CANCELLED                                     server     UNAVAILABLE: callers know the model under our name
UNAUTHENTICATED, PERMISSION_DENIED                       server     FAILED_PRECONDITION: the credentials are ours
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc

from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    ShoalError,
    Unavailable,
    Unimplemented,
    retry_after_of,
)

RETRY_AFTER_MS = 1000
"""Retry time where the remote server sends none: gRPC reconnects after about that time."""

# Characters of a remote message that are passed on: a status message is sent in a header.
_MAX_TEXT = 1000
# Text of gRPC's own libraries, on the client and on the server.
_TOO_LARGE = "message larger than max"

_REQUEST_ERRORS: dict[int, type[ShoalError]] = {
    Code.INVALID_ARGUMENT: InvalidArgument,
    Code.OUT_OF_RANGE: OutOfRange,
    Code.FAILED_PRECONDITION: FailedPrecondition,
}


class NotServable(FailedPrecondition):
    """The remote model cannot be served from here, and a retry would fail in the same way."""


class BatchFailed(Exception):
    """The server failed, not a request of the batch: all requests get `error`, and none is retried."""

    def __init__(self, error: ShoalError) -> None:
        super().__init__(error.message)
        self.error = error


class CredentialsRejected(BatchFailed):
    """The remote server rejects this server's credentials."""


def of(error: grpc.RpcError, model: str, fault_text: str = "") -> Exception:
    """Return the error of a failed call: BatchFailed, ModelFailed (the model raised), or the ShoalError of a request.

    Args:
        model: the local name of the model.
        fault_text: text in the errors of a model, for a server whose status does not tell them apart.
    """
    code, text = error.code(), (error.details() or "")[:_MAX_TEXT]
    if fault_text and fault_text in text:
        return ModelFailed(text.partition("\n")[0])
    trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return _of(int(code.value[0]), text, retry_after_of(trailing), f"model '{model}': the remote server")


def _of(code: int, text: str, after_ms: int | None, server: str) -> Exception:
    quoted = f"{server} says: {text}"
    if code in _REQUEST_ERRORS:
        return _REQUEST_ERRORS[code](quoted)
    match code:
        case Code.RESOURCE_EXHAUSTED if _TOO_LARGE in text.lower():
            return ResourceExhausted(f"{server} or its response: {text}")
        case Code.RESOURCE_EXHAUSTED:
            return BatchFailed(ResourceExhausted(quoted, retry_after_ms=after_ms or RETRY_AFTER_MS))
        case Code.UNAVAILABLE:
            return BatchFailed(
                Unavailable(f"{server} is unavailable: {text}", retry_after_ms=after_ms or RETRY_AFTER_MS)
            )
        case Code.NOT_FOUND:
            return BatchFailed(Unavailable(f"{server} does not have it: {text}", retry_after_ms=RETRY_AFTER_MS))
        case Code.CANCELLED:
            return BatchFailed(Unavailable(f"{server} ended the call: {text}", retry_after_ms=RETRY_AFTER_MS))
        case Code.DEADLINE_EXCEEDED:
            return BatchFailed(DeadlineExceeded(f"{server} did not respond in time"))
        case Code.UNIMPLEMENTED:
            return BatchFailed(Unimplemented(quoted))
        case Code.UNAUTHENTICATED | Code.PERMISSION_DENIED:
            return CredentialsRejected(
                FailedPrecondition(f"{server} does not accept the credentials of this server: {text}")
            )
    return ModelFailed(text or f"the remote server returned {Code(code).name} without a message")
