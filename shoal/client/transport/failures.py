"""A failed call, in the words of someone who wants to know what to do."""

from __future__ import annotations

import math
import re

import grpc

from shoal.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ShoalError,
    Unavailable,
    Unimplemented,
    from_status,
    retry_after_of,
)

# grpc's own words, and asyncio's and the lean client's. Nothing but the text tells these apart: all are UNAVAILABLE.
_NOBODY = re.compile(
    r"Connection refused|Connect call failed|No such file or directory|Connection timed out|No route to host"
    r"|unreachable"
)
_NO_NAME = re.compile(r"errors resolving|DNS resolution failed")
_NOT_GRPC = re.compile(r"Failed parsing HTTP/2|http1\.x server|^cannot reach \S+: it broke HTTP/2")
# All that is left of a stream whose other end died: what Envoy's reset becomes, and what grpc.aio says when it was
# sending as that happened (the real status is lost then). Neither is a fault of the service, as INTERNAL would say.
_BROKEN = re.compile(r"RST_STREAM|^Internal error from Core$")
# What the lean client says of a connection that ended under its calls.
_LOST = re.compile(r"^lost \S+: ")
# Envoy's own words: it knows the service, and has no instance of it.
_NO_INSTANCE = re.compile(r"no healthy upstream")
# How a server says that it has no such method: grpc's own words are only this, and those of our fronts begin so.
_NO_METHOD = "Method not found"
# The lean client's words for an answer of a plain web server.
_NOT_OF_GRPC = "the answer is not gRPC's"


def explain(err: grpc.aio.AioRpcError, *, address: str, doing: str, timeout_s: float) -> ShoalError:
    """The ShoalError of a failed call to `address`; `doing` says which call, `timeout_s` how long it was given."""
    code, details = err.code(), err.details() or "no details"
    if code == grpc.StatusCode.INTERNAL and _BROKEN.search(details):
        return Unavailable(f"{doing}: the connection broke")
    if code == grpc.StatusCode.UNAVAILABLE:
        return _unavailable(details, address, doing, retry_after_of(err.trailing_metadata() or ()))
    if code == grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":
        return too_late(doing, timeout_s)
    is_web = code == grpc.StatusCode.UNKNOWN and details.startswith(_NOT_OF_GRPC)
    if is_web or (code == grpc.StatusCode.UNIMPLEMENTED and "http2 header" in details):
        return FailedPrecondition(f"what answers at {address} is not a Shoal gateway ({details}): check the address")
    if code == grpc.StatusCode.UNIMPLEMENTED and details.startswith(_NO_METHOD):
        return Unimplemented(
            f"{doing}: the server at {address} does not know this call: is it only an inference server? `shoal serve` "
            "has the models of its folder; a registry, jobs and results are a node's (`shoal up`)"
        )
    return from_status(code.value[0], details, retry_after_ms=retry_after_of(err.trailing_metadata() or ()))


def too_late(doing: str, timeout_s: float) -> DeadlineExceeded:
    """The call had no answer in time."""
    return DeadlineExceeded(f"{doing}: no answer within {timeout_s:g} s: allow more time, or look at `shoal status`")


def _unavailable(details: str, address: str, doing: str, retry_after_ms: int | None) -> ShoalError:
    if _NOBODY.search(details):
        return Unavailable(f"no node answers at {address}: start one with `shoal up`, or give --gateway")
    if _NO_NAME.search(details):
        return Unavailable(f"no host has the name in {address}: check the address")
    if _NOT_GRPC.search(details):
        return FailedPrecondition(f"what answers at {address} does not speak gRPC: is that Envoy's admin port?")
    if _NO_INSTANCE.search(details):
        return Unavailable(f"{doing}: no instance can answer just now: look at `shoal status`")
    if lost := _LOST.match(details):
        return Unavailable(f"{doing}: the connection broke: {details[lost.end() :]}")
    return Unavailable(f"{doing}: {details}", retry_after_ms=retry_after_ms)


def of_answer(code: int, message: str) -> ShoalError:
    """The error of a refusal that came in-band."""
    return from_status(code or Code.UNKNOWN, message or "no details")


def bounded(timeout_s: float) -> float:
    """`timeout_s` as grpc can hold it. Raises InvalidArgument for what is no duration."""
    if math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidArgument(f"timeout={timeout_s}: give seconds, 0 or more")
    return min(timeout_s, 365 * 86_400.0)
