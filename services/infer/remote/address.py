"""Address of a remote server: `grpc://host:port`, `grpcs://host:port` (TLS), `unix:/path`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from services.infer.error_text import quoted
from shoal.errors import FailedPrecondition

_EXPECTED = "expected grpc://host:port, grpcs://host:port or unix:/path"


@dataclass(frozen=True)
class Address:
    """Address of one server."""

    url: str
    """URL as in the configuration."""
    target: str
    """Target for gRPC's name resolution."""
    is_secure: bool = False
    """True for a connection through TLS."""


def read(url: str) -> Address:
    """Return the address in `url`. Raises FailedPrecondition, with the expected form, when the URL is wrong."""
    if not url:
        raise FailedPrecondition(f"parameter url is missing: {_EXPECTED}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _wrong(url)
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise _wrong(url)
        return Address(url, f"unix:{path}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as err:
        raise _wrong(url) from err
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not port or not _is_bare(parts):
        raise _wrong(url)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(url, f"dns:///{host}:{port}", parts.scheme == "grpcs")


def _is_bare(parts: SplitResult) -> bool:
    return parts.path in ("", "/") and not (parts.query or parts.fragment or "@" in parts.netloc)


def _wrong(url: str) -> FailedPrecondition:
    # The part before an @ may be a password, and callers see the message.
    return FailedPrecondition(f"parameter url {quoted(url.rpartition('@')[2])}: {_EXPECTED}")
