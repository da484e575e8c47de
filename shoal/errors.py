"""Errors of Shoal, with the same classes in services and clients.

A service raises an error; the interceptor at its edge converts it to a gRPC status; the client converts the status back
to the same class.
    ShoalError
    ShoalError
    ├── InvalidArgument      the request is wrong: the message names the field, the expected and the received value
    ├── NotFound             no such model, job, artifact, instance ...
    ├── AlreadyExists        the name belongs to something else
    ├── FailedPrecondition   not possible in the present state: the message says what must happen first
    ├── OutOfRange           an offset or token beyond the end
    ├── Unauthenticated      no valid identity
    ├── PermissionDenied     a valid identity without the permission
    ├── ResourceExhausted    overload or a quota: retry after `retry_after_ms`
    ├── Aborted              a concurrent change won: read again, then retry
    ├── Cancelled            the caller cancelled
    ├── DeadlineExceeded     not done in time
    ├── Unimplemented        Shoal does not support this
    ├── Unavailable          no instance at present: retry
    ├── DataLoss             stored bytes have changed
    └── Internal             a fault of the service; its log has the cause
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar

# Longer names are cut in messages: a status with a long one would not fit into a header.
_NAME_LENGTH = 128


class Code(IntEnum):
    """Canonical status codes; the numbers are gRPC's (https://grpc.io/docs/guides/status-codes/)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ShoalError(Exception):
    """Base of all errors that Shoal raises on purpose. `code` is the gRPC status code."""

    code: ClassVar[Code] = Code.UNKNOWN
    trailing: tuple[tuple[str, str], ...] = ()
    """Further trailing metadata of the call that fails, and headers of its response over REST."""
    trace_id: str = ""
    """Trace of the failed call, for `shoal trace`; empty: the server has named none."""

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        # A model's text may have characters that no message carries.
        if not message.isascii():
            message = message.encode(errors="replace").decode()
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class InvalidArgument(ShoalError):
    code = Code.INVALID_ARGUMENT


class NotFound(ShoalError):
    code = Code.NOT_FOUND


class AlreadyExists(ShoalError):
    code = Code.ALREADY_EXISTS


class FailedPrecondition(ShoalError):
    code = Code.FAILED_PRECONDITION


class OutOfRange(ShoalError):
    code = Code.OUT_OF_RANGE


class Unauthenticated(ShoalError):
    code = Code.UNAUTHENTICATED


class PermissionDenied(ShoalError):
    code = Code.PERMISSION_DENIED


class ResourceExhausted(ShoalError):
    code = Code.RESOURCE_EXHAUSTED


class LimitReached(ResourceExhausted):
    """A limit of the policy is reached. `trailing` has the headers `x-ratelimit-...`, which name it."""

    def __init__(self, message: str, *, retry_after_ms: int, trailing: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)
        self.trailing = trailing


class Aborted(ShoalError):
    code = Code.ABORTED


class Cancelled(ShoalError):
    code = Code.CANCELLED


class DeadlineExceeded(ShoalError):
    code = Code.DEADLINE_EXCEEDED


class Unimplemented(ShoalError):
    code = Code.UNIMPLEMENTED


class Unavailable(ShoalError):
    code = Code.UNAVAILABLE


class DataLoss(ShoalError):
    code = Code.DATA_LOSS


class Internal(ShoalError):
    code = Code.INTERNAL


RATE_LIMIT_KEY = "x-ratelimit-limit"
"""Key of the trailing metadata with the limit of the policy that has rejected a call."""
TRACE_KEY = "shoal-trace"
"""Key of the trailing metadata, and header over REST, with the trace of a call whose spans are kept."""
RETRY_AFTER_KEY = "retry-after-ms"
"""Key of the trailing metadata with the time after which a rejected call may be retried, in milliseconds."""
ERROR_CODE_PARAMETER = "error_code"
"""Parameter of a failed response within an inference stream: the number of the gRPC status code."""
RETRY_AFTER_PARAMETER = "retry_after_ms"
"""Parameter of a failed response within an inference stream: the same as RETRY_AFTER_KEY."""
_LONGEST_WAIT_MS = 3_600_000
_TRACE_ID = re.compile(r"[0-9a-f]{32}")


def retry_after_of(trailing: Iterable[tuple[str, str | bytes]]) -> int | None:
    """Return the time to wait before a retry from a call's trailing metadata, in milliseconds; an hour at most."""
    for key, value in trailing:
        if key == RETRY_AFTER_KEY and isinstance(value, str) and value.isdecimal():
            return min(int(value[:10]), _LONGEST_WAIT_MS)
    return None


def retry_metadata(error: ShoalError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata that says when to retry: in milliseconds, and in whole seconds for HTTP.

    The second is a header of JSON calls, which a gateway transcodes (RFC 9110, section 10.2.3).
    """
    wait_ms = error.retry_after_ms
    return () if wait_ms is None else ((RETRY_AFTER_KEY, str(wait_ms)), ("retry-after", str(math.ceil(wait_ms / 1000))))


def trace_of(trailing: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the trace that a call's trailing metadata names; empty without one."""
    for key, value in trailing:
        if key == TRACE_KEY and isinstance(value, str) and _TRACE_ID.fullmatch(value):
            return value
    return ""


BY_CODE: dict[Code, type[ShoalError]] = {error.code: error for error in ShoalError.__subclasses__()}


def from_status(code: int, message: str, *, retry_after_ms: int | None = None) -> ShoalError:
    """Return the error of a numeric gRPC status; ShoalError itself for UNKNOWN or an unknown number."""
    try:
        error = BY_CODE.get(Code(code), ShoalError)
    except ValueError:
        error = ShoalError
    return error(message, retry_after_ms=retry_after_ms)


def quoted(name: str) -> str:
    """Return a name in single quotes, cut after 128 characters."""
    return f"'{name}'" if len(name) <= _NAME_LENGTH else f"'{name[:_NAME_LENGTH]}...' ({len(name)} characters)"
