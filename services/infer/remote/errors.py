"""What the status of a remote call means here: whose fault it is, and what the caller is told.

INVALID_ARGUMENT, OUT_OF_RANGE, FAILED_PRECONDITION      the request's: a batch is bisected, the guilty one hears it
INTERNAL, UNKNOWN, DATA_LOSS, ABORTED, ALREADY_EXISTS    the model's: the same, as INTERNAL
RESOURCE_EXHAUSTED for a message that is too large       the request's, if it is alone too large
RESOURCE_EXHAUSTED, UNAVAILABLE                          nobody's: as they are, with a time to come back
DEADLINE_EXCEEDED, UNIMPLEMENTED                         nobody's: as they are
NOT_FOUND, CANCELLED                                     nobody's: UNAVAILABLE, for the model is one of ours
UNAUTHENTICATED, PERMISSION_DENIED                       nobody's: FAILED_PRECONDITION, for it is not the caller's key
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
"""Where the remote server does not say: a connection is tried again within about so long."""

_TEXT = 1000
# Characters of a remote message that are passed on: a status message travels in a header.
_TOO_LARGE = "message larger than max"
# What gRPC's own libraries say, on either side.

_REQUESTS: dict[int, type[ShoalError]] = {
    Code.INVALID_ARGUMENT: InvalidArgument,
    Code.OUT_OF_RANGE: OutOfRange,
    Code.FAILED_PRECONDITION: FailedPrecondition,
}


class NotServable(FailedPrecondition):
    """What the remote server has cannot be served from here; another try would show the same."""


class NotToBlame(Exception):
    """No call of the batch is at fault: all of them get `error`, and none is tried again."""

    def __init__(self, error: ShoalError) -> None:
        super().__init__(error.message)
        self.error = error


class NotAccepted(NotToBlame):
    """The remote server does not accept our credentials."""


def of(error: grpc.RpcError, model: str, fault: str = "") -> Exception:
    """The error of a call that failed: a ShoalError or ModelFailed is the request's or the model's own fault.

    Args:
        model: its name here.
        fault: a server whose status does not tell says with this text that the model raised.
    """
    code, text = error.code(), (error.details() or "")[:_TEXT]
    if fault and fault in text:
        return ModelFailed(text.partition("\n")[0])
    trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return _of(int(code.value[0]), text, retry_after_of(trailing), f"model '{model}': the remote server")


def _of(code: int, text: str, after_ms: int | None, who: str) -> Exception:
    says = f"{who} says: {text}"
    if code in _REQUESTS:
        return _REQUESTS[code](says)
    match code:
        case Code.RESOURCE_EXHAUSTED if _TOO_LARGE in text.lower():
            return ResourceExhausted(f"{who} or its answer: {text}")
        case Code.RESOURCE_EXHAUSTED:
            return NotToBlame(ResourceExhausted(says, retry_after_ms=after_ms or RETRY_AFTER_MS))
        case Code.UNAVAILABLE:
            return NotToBlame(Unavailable(f"{who} is unavailable: {text}", retry_after_ms=after_ms or RETRY_AFTER_MS))
        case Code.NOT_FOUND:
            return NotToBlame(Unavailable(f"{who} does not have it: {text}", retry_after_ms=RETRY_AFTER_MS))
        case Code.CANCELLED:
            return NotToBlame(Unavailable(f"{who} ended the call: {text}", retry_after_ms=RETRY_AFTER_MS))
        case Code.DEADLINE_EXCEEDED:
            return NotToBlame(DeadlineExceeded(f"{who} did not answer in time"))
        case Code.UNIMPLEMENTED:
            return NotToBlame(Unimplemented(says))
        case Code.UNAUTHENTICATED | Code.PERMISSION_DENIED:
            return NotAccepted(FailedPrecondition(f"{who} does not accept the credentials of this server: {text}"))
    return ModelFailed(text or f"the remote server answered {Code(code).name} without a message")
