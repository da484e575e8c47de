"""The headers of a call: those that all calls of a method share are encoded once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from mesh.h2.headers import encode
from mesh.rpc import status

Metadata = Iterable[tuple[str, str | bytes]]

_NAME = re.compile(r"[0-9a-z_.-]+")
_TEXT = re.compile(r"[\x20-\x7e]*")
_KEPT = 1024
# Of each kind: values that never come again (trace ids) push the others out now and then.

_DIGITS = 10**8
# grpc-timeout has eight at most.


@lru_cache(_KEPT)
def head(path: str, authority: str) -> bytes:
    """What begins every call of the method `path`."""
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
    """A call's metadata. Raises ValueError for names and values that no header can carry."""
    return b"".join([_pair(key, value) for key, value in pairs])


@lru_cache(_KEPT)
def _pair(key: str, value: str | bytes) -> bytes:
    is_binary = key.endswith("-bin")
    if not _NAME.fullmatch(key) or key.startswith("grpc-"):
        raise ValueError(f"metadata {key!r}: no name that a header may have")
    if not is_binary and (not isinstance(value, str) or not _TEXT.fullmatch(value)):
        raise ValueError(f"metadata {key}: {value!r} is not printable ASCII: names that end with -bin take bytes")
    return encode(status.encoded([(key, value)]))


@lru_cache(_KEPT)
def timeout(seconds: float) -> bytes:
    """The header that says how long the caller waits, which is never less than it does."""
    micros = max(1, -int(-seconds * 1e6 // 1))
    if micros < _DIGITS:
        text = b"%du" % micros
    elif (millis := -(-micros // 1000)) < _DIGITS:
        text = b"%dm" % millis
    else:
        text = b"%dS" % min(-(-millis // 1000), _DIGITS - 1)
    return encode([(b"grpc-timeout", text)])
