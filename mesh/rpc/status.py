"""gRPC statuses, timeouts and metadata as HTTP/2 headers (the gRPC protocol, PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from shoal.errors import Code, InvalidArgument

Headers = list[tuple[bytes, bytes]]

CONTENT_TYPE = (b"content-type", b"application/grpc")
OK: Headers = [(b"grpc-status", b"0")]

_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
# Printable ASCII except the percent sign. All other bytes of UTF-8 are percent-encoded.
_SAFE = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"

# Clients name the same few timeouts; the limit bounds what a hostile one can add.
_KNOWN_TIMEOUTS: dict[bytes, float] = {}
_MAX_KNOWN = 4096


def timeout_s(header: bytes) -> float:
    """Return the seconds of a `grpc-timeout` header. Raises InvalidArgument for an invalid one."""
    known = _KNOWN_TIMEOUTS.get(header)
    if known is not None:
        return known
    match = _TIMEOUT.fullmatch(header)
    if match is None:
        said = header[:40].decode("latin-1")
        raise InvalidArgument(f"grpc-timeout {said!r}: expected up to 8 digits and one of H, M, S, m, u, n")
    seconds = int(match[1]) * _UNITS[match[2]]
    if len(_KNOWN_TIMEOUTS) < _MAX_KNOWN:
        _KNOWN_TIMEOUTS[header] = seconds
    return seconds


def deadline(headers: dict[bytes, bytes], now: float) -> float:
    """Return the deadline of a call, on the clock of `now`; infinite without `grpc-timeout`. Raises InvalidArgument."""
    given = headers.get(b"grpc-timeout")
    return math.inf if given is None else now + timeout_s(given)


def trailers(code: Code | int, message: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> Headers:
    """Return the trailers that end a call."""
    found: Headers = [(b"grpc-status", b"%d" % int(code))]
    if message:
        found.append((b"grpc-message", quote(message, safe=_SAFE, errors="replace").encode()))
    found.extend(encoded(metadata))
    return found


def encoded(metadata: Iterable[tuple[str, str | bytes]]) -> Headers:
    """Encode metadata as headers: `-bin` values in base64."""
    return [(key.lower().encode(), _value(key, value)) for key, value in metadata]


def _value(key: str, value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return base64.b64encode(raw).rstrip(b"=") if key.endswith("-bin") else raw


def metadata(headers: Iterable[tuple[bytes, bytes]]) -> Sequence[tuple[str, str | bytes]]:
    """Return the caller's metadata in gRPC's form for handlers: without the protocol's own headers."""
    found: list[tuple[str, str | bytes]] = []
    for key, value in headers:
        if key.startswith((b"grpc-", b":")) or key in _PROTOCOL:
            continue
        name = key.decode("latin-1")
        if not name.endswith("-bin"):
            found.append((name, value.decode("latin-1")))
            continue
        for part in value.split(b","):
            try:
                found.append((name, base64.b64decode(part.strip() + b"=" * (-len(part.strip()) % 4), validate=True)))
            except binascii.Error as err:
                raise InvalidArgument(f"metadata {name}: expected base64") from err
    return found


_PROTOCOL = frozenset({b"te", b"content-type", b"content-length", b"host", b"connection"})
