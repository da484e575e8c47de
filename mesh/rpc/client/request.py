"""Request headers of a call; the headers that all calls of a method share are encoded once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from opentelemetry import context, propagate

from mesh.h2.headers import encode
from mesh.rpc import status

Metadata = Iterable[tuple[str, str | bytes]]

_NAME = re.compile(r"[0-9a-z_.-]+")
_TEXT = re.compile(r"[\x20-\x7e]*")
# Cached encodings of each kind. Values that never repeat (trace ids) evict the others now and then.
_CACHED = 1024

# grpc-timeout has at most eight digits.
_DIGITS = 10**8


@lru_cache(_CACHED)
def head(path: str, authority: str) -> bytes:
    """Return the headers that every call of the method `path` begins with."""
    return encode(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            status.CONTENT_TYPE,
            (b"user-agent", b"shoal"),
        ]
    )


def metadata(pairs: Metadata) -> bytes:
    """Return a call's metadata as headers. Raises ValueError for names and values that no header can carry."""
    return b"".join([_pair(key, value) for key, value in pairs])


@lru_cache(_CACHED)
def _pair(key: str, value: str | bytes) -> bytes:
    is_binary = key.endswith("-bin")
    if not _NAME.fullmatch(key) or key.startswith("grpc-"):
        raise ValueError(f"metadata {key!r}: not a valid header name")
    if not is_binary and (not isinstance(value, str) or not _TEXT.fullmatch(value)):
        raise ValueError(f"metadata {key}: {value!r} is not printable ASCII: use a name that ends with -bin for bytes")
    return encode(status.encoded([(key, value)]))


@lru_cache(_CACHED)
def timeout(seconds: float) -> bytes:
    """Return the `grpc-timeout` header, rounded up: a server never gives up before the caller does."""
    micros = max(1, -int(-seconds * 1e6 // 1))
    if micros < _DIGITS:
        text = b"%du" % micros
    elif (millis := -(-micros // 1000)) < _DIGITS:
        text = b"%dm" % millis
    else:
        text = b"%dS" % min(-(-millis // 1000), _DIGITS - 1)
    return encode([(b"grpc-timeout", text)])


def trace_metadata() -> dict[str, str]:
    """Return the current trace as metadata of a call; empty without a trace."""
    carrier: dict[str, str] = {}
    if context.get_current():
        propagate.inject(carrier)
    return carrier
