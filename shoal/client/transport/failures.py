"""Conversion of failed calls to ShoalErrors whose message says what to do."""

from __future__ import annotations

import re

import grpc

from mesh.rpc.client.failures import CallFailed
from shoal.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    ShoalError,
    Unavailable,
    Unimplemented,
    from_status,
    retry_after_of,
    trace_of,
)

# Beginnings of messages about a node that was not reached: of mesh.rpc.client and of grpc. grpc does not tell its own
# errors from those of the server, whose text has another beginning.
_NOT_REACHED = re.compile(r"^(?:cannot reach \S+: |failed to connect to all addresses|errors resolving|DNS resolution)")
# What follows, of asyncio, the kernel and grpc: all have code UNAVAILABLE, only the text differs.
_UNREACHABLE = re.compile(
    r"Connection refused|Connect call failed|No such file or directory|Connection timed out|No route to host"
    r"|unreachable"
)
_UNKNOWN_HOST = re.compile(r"errors resolving|DNS resolution failed")
_NOT_GRPC = re.compile(r"Failed parsing HTTP/2|http1\.x server|^cannot reach \S+: the peer broke HTTP/2")
# Messages of OpenSSL, BoringSSL (grpc's) and asyncio about a failed handshake.
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED\W+(?:certificate verify failed: )?(?P<why>[^:(]+)")
# Reasons for which another CA is no remedy.
_OUT_OF_DATE = {"certificate has expired": "has expired", "certificate is not yet valid": "is not yet valid"}
_WRONG_NAME = re.compile(r"Hostname mismatch|IP address mismatch|Hostname Verification Check failed")
_NOT_TLS = re.compile(r"WRONG_VERSION_NUMBER|HTTP_REQUEST")
_CLIENT_CERTIFICATE = re.compile(r"CERTIFICATE_REQUIRED|ALERT_(?:UNKNOWN_CA|BAD_CERTIFICATE|CERTIFICATE_\w+)")
# A server closes the connection of a client that speaks plaintext, or lacks a certificate, without a word.
_CLOSED_AT_ONCE = re.compile(r"^cannot reach \S+: the connection was closed|last error: .*Socket closed")
# A stream whose peer died: the text of a reset from Envoy, and that of grpc.aio's `write`, which hides the real status
# (`grpc_aio._feed`). The code is INTERNAL, but neither is a fault of the service.
_BROKEN = re.compile(r"RST_STREAM|^Internal error from Core$")
# Messages of the client's own deadline. grpc.aio has the second one for a call that was sending.
_PASSED = ("Deadline Exceeded", "Stream removed (Deadline Exceeded)")
# mesh.h2's message about a connection that ended during its calls.
_LOST = re.compile(r"^lost \S+: ")
# Envoy's message when it knows the service but no instance of it.
_NO_INSTANCE = re.compile(r"no healthy upstream")
# A server without the method: grpc's whole message, and the beginning of the message of Shoal's own servers.
_NO_METHOD = "Method not found"
# mesh.h2's message about the response of a plain web server.
_NOT_GRPC_RESPONSE = "the response is not gRPC's"


def explain(err: grpc.aio.AioRpcError, *, address: str, doing: str, timeout_s: float | None) -> ShoalError:
    """Return the ShoalError of a failed call to `address`; `doing` names the call, `timeout_s` is its time limit."""
    found = _explained(err, address=address, doing=doing, timeout_s=timeout_s)
    found.trace_id = trace_of(err.trailing_metadata() or ())
    return found


def _explained(err: grpc.aio.AioRpcError, *, address: str, doing: str, timeout_s: float | None) -> ShoalError:
    code, details = err.code(), err.details() or "no details"
    if code == grpc.StatusCode.INTERNAL and _BROKEN.search(details):
        return Unavailable(f"{doing}: the connection broke")
    if code == grpc.StatusCode.UNAVAILABLE:
        retry_after_ms = retry_after_of(err.trailing_metadata() or ())
        if not (isinstance(err, CallFailed) and err.is_from_peer):
            return _unavailable(details, address, doing, retry_after_ms)
        return _sent_as_unavailable(details, doing, retry_after_ms)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED and details in _PASSED:
        return timed_out(doing, timeout_s)
    is_web = code == grpc.StatusCode.UNKNOWN and details.startswith(_NOT_GRPC_RESPONSE)
    if is_web or (code == grpc.StatusCode.UNIMPLEMENTED and "http2 header" in details):
        return FailedPrecondition(f"the server at {address} is not a Shoal gateway ({details}): check the address")
    if code == grpc.StatusCode.UNIMPLEMENTED and details.startswith(_NO_METHOD):
        return Unimplemented(
            f"{doing}: the server at {address} does not know this call. An inference server (`shoal serve`) has only "
            "the models of its folder; the registry, jobs and results need a node (`shoal up`)"
        )
    return from_status(code.value[0], details, retry_after_ms=retry_after_of(err.trailing_metadata() or ()))


def timed_out(doing: str, timeout_s: float | None) -> DeadlineExceeded:
    """Return the error of a call without a response in time; a server's own limit has no `timeout_s`."""
    within = "in time" if timeout_s is None else f"within {timeout_s:g} s"
    return DeadlineExceeded(f"{doing}: no response {within}: allow more time, or see `shoal status`")


def _unavailable(details: str, address: str, doing: str, retry_after_ms: int | None) -> ShoalError:
    if address.startswith("https://") and (failed := _handshake_failure(details, address)):
        return failed
    is_reached = not _NOT_REACHED.match(details)
    if not is_reached and _UNREACHABLE.search(details):
        return Unavailable(f"no node responds at {address}: start one with `shoal up`, or give --gateway")
    if not is_reached and _UNKNOWN_HOST.search(details):
        return Unavailable(f"no host has the name in {address}: check the address")
    if _NOT_GRPC.search(details):
        return FailedPrecondition(f"the server at {address} does not speak gRPC: is that Envoy's admin port?")
    if _CLOSED_AT_ONCE.search(details):
        is_plain = not address.startswith("https://")
        cause = (
            f"accepts TLS only, so call https://{address}"
            if is_plain
            else "wants a certificate of the client: cert, key"
        )
        return Unavailable(
            f"{doing}: the server at {address} closed the connection immediately: it is restarting, or {cause}"
        )
    if lost := _LOST.match(details):
        return Unavailable(f"{doing}: the connection broke: {details[lost.end() :]}")
    return _sent_as_unavailable(details, doing, retry_after_ms)


def _sent_as_unavailable(details: str, doing: str, retry_after_ms: int | None) -> Unavailable:
    """Return the error of a call that a server, or its Envoy, has ended with UNAVAILABLE."""
    if _NO_INSTANCE.search(details):
        return Unavailable(f"{doing}: no instance is available at present: see `shoal status`")
    return Unavailable(f"{doing}: {details}", retry_after_ms=retry_after_ms)


def _handshake_failure(details: str, address: str) -> ShoalError | None:
    """Return the error of a failed TLS handshake. A retry would fail in the same way."""
    if _WRONG_NAME.search(details):
        return FailedPrecondition(
            f"the certificate of {address} is for other names: call the server by a name or address of its certificate "
            "(with `--tls auto`, `--tls-name` adds one)"
        )
    if untrusted := _UNTRUSTED.search(details):
        if when := _OUT_OF_DATE.get(untrusted["why"].strip()):
            return FailedPrecondition(
                f"the certificate of {address}, or its CA's, {when}: renew it on the server (`shoal doctor` there "
                "says which), or set the clock of this machine"
            )
        return FailedPrecondition(
            f"the certificate of {address} is not trusted ({untrusted['why'].strip()}): give the CA that signed it "
            "with ca=FILE or SHOAL_CA=FILE; on a server with `--tls auto`, `shoal ca show` prints it"
        )
    if _CLIENT_CERTIFICATE.search(details):
        return FailedPrecondition(
            f"the server at {address} wants a certificate of the client, or does not accept the given one: cert, key"
        )
    if _NOT_TLS.search(details):
        plain = address.removeprefix("https://")
        return FailedPrecondition(f"the server at {address} does not speak TLS: call http://{plain}, if that is meant")
    return None


def of_rejection(code: int, message: str) -> ShoalError:
    """Return the error of a rejection inside a response message."""
    return from_status(code or Code.UNKNOWN, message or "no details")
