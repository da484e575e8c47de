"""Operation, model and version that a request's path names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from shoal.access import rest_paths
from shoal.errors import InvalidArgument, NotFound

# Longer paths name nothing. A name of 255 characters has at most 3,060 bytes when it is encoded.
_MAX_PATH = 8 << 10

# Characters of a method and of a path in an error.
_SAID_METHOD, _SAID_PATH = 20, 200

# Targets that are kept: 2 MiB of the longest paths.
_KEPT = 256

_NO_NAMES = frozenset(("", ".", ".."))

_HEX = frozenset(b"0123456789abcdefABCDEF")


class MethodNotAllowed(Exception):
    """The path is served, with other methods."""

    def __init__(self, call: str, methods: Iterable[str]) -> None:
        self.methods = sorted(set(methods))
        super().__init__(f"no call {call}: send it with {' or '.join(self.methods)}")


@dataclass(frozen=True, slots=True)
class Target:
    """Operation, model and version that the path of a request names."""

    operation: str
    rpc: str
    """Path of the RPC of gRPC that does the same."""
    model: str = ""
    version: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Other values in the path, by name."""


def read(method: str, path: str) -> Target:
    """Return the target of a request. Names are percent-decoded, once; the rest is compared as gateways do, undecoded.

    Raises:
        NotFound: no such path is served. MethodNotAllowed: not with this method.
        InvalidArgument: the path is not encoded correctly.
    """
    return _read(method, path.partition("?")[0])


def call_text(method: str, path: str) -> str:
    """Return a request's method and path for an error, cut off where they are long, without the query."""
    return f"{method[:_SAID_METHOD]} {path.partition('?')[0][:_SAID_PATH]}"


@lru_cache(maxsize=_KEPT)
def _read(method: str, plain: str) -> Target:
    if len(plain) > _MAX_PATH:
        raise NotFound(f"no call has a path of {len(plain)} characters: at most {_MAX_PATH}")
    call = call_text(method, plain)
    if not plain.startswith("/"):
        raise NotFound(f"no call {call}")
    segments = tuple(plain[1:].split("/"))
    if any(segment in _NO_NAMES for segment in segments):
        raise _no_name(call)
    others: list[str] = []
    for found, written in rest_paths.found(segments):
        if method in found.methods:
            values = {name: _decoded(value) if "%" in value else value for name, value in written.items()}
            if any(part in _NO_NAMES for value in values.values() for part in value.split("/")):
                raise _no_name(call)
            version = values.pop("version", "")
            # As Triton: a version that is no number is no path.
            if version and not (version.isascii() and version.isdecimal()):
                raise NotFound(f"no call {call}: the version of a model is a number")
            return Target(found.operation, found.rpc, values.pop("model", ""), version, values)
        others += found.methods
    if others:
        raise MethodNotAllowed(call, others)
    raise NotFound(f"no call {call}")


def _no_name(call: str) -> NotFound:
    return NotFound(f"no call {call}: no part of a path is empty, '.' or '..'")


def _decoded(written: str) -> str:
    raw = written.encode("latin-1")
    for part in raw.split(b"%")[1:]:
        if len(part) < 2 or not _HEX.issuperset(part[:2]):
            raise InvalidArgument("the path has a percent sign without two hexadecimal digits")
    try:
        name = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError as err:
        raise InvalidArgument("the path is not UTF-8 when it is decoded") from err
    if not name.isprintable() or "\\" in name:
        raise InvalidArgument("the path has a control character, or a backslash, when it is decoded")
    return name
