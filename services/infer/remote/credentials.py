"""Credentials for a remote server: the headers of each call, and the TLS files. References keep secrets out of configs.

${env:NAME}    an environment variable of this server
${file:PATH}   the text of a file, without surrounding white space; relative to the model's folder, or absolute
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from services.infer.error_text import quoted
from services.infer.model_files.wanted_models import read_bytes, read_text
from shoal.errors import FailedPrecondition

_REFERENCE = re.compile(r"\$\{([^}:]*)(?::([^}]*))?\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_RESERVED = ("grpc-", "content-type", "te", "user-agent", "host", "connection")
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_MAX_BYTES = 64 << 10


@dataclass(frozen=True)
class Headers:
    """Headers of every call, with unresolved references: read again when the remote server rejects the credentials."""

    written: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)
    environ: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> tuple[tuple[str, str], ...]:
        """Return names and values. Raises FailedPrecondition that names the parameter and contains no secret."""
        return tuple((name, self._value(name, text)) for name, text in self.written.items())

    def _value(self, name: str, text: str) -> str:
        what = f"parameter metadata.{name}"
        value = _REFERENCE.sub(lambda found: self._resolve(found[1], found[2], what), text)
        if not _VALUE.fullmatch(value):
            raise FailedPrecondition(f"{what}: expected printable ASCII, at least one character")
        return value

    def _resolve(self, kind: str, name: str | None, what: str) -> str:
        if kind not in ("env", "file") or not name:
            raise FailedPrecondition(
                f"{what}: expected ${{env:NAME}} or ${{file:PATH}} after a dollar sign and a brace"
            )
        if kind == "env":
            if name not in self.environ:
                raise FailedPrecondition(f"{what}: the environment variable {quoted(name)} is not set")
            return self.environ[name]
        try:
            return read_text(self.folder / name, _MAX_BYTES).strip()
        except FailedPrecondition as err:
            raise FailedPrecondition(f"{what}: {err.message}") from err


def check_name(name: str) -> None:
    """Raise FailedPrecondition when `name` is not a valid header name."""
    if not _NAME.fullmatch(name) or name.endswith("-bin"):
        raise FailedPrecondition(
            f"parameter metadata.{name[:128]}: expected the name of a header in lower case, not one of bytes (-bin)"
        )
    if any(name == reserved or (reserved.endswith("-") and name.startswith(reserved)) for reserved in _RESERVED):
        raise FailedPrecondition(f"parameter metadata.{name}: this header is gRPC's own")


@dataclass(frozen=True)
class Tls:
    """PEM files of a TLS connection."""

    ca_file: Path | None = None
    """CA certificates for the server's certificate; None: gRPC's default roots."""
    certificate_file: Path | None = None
    key_file: Path | None = None
    """The client's certificate and key, for servers that require mutual TLS."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the channel's credentials. Raises FailedPrecondition when a file cannot be read."""
        return grpc.ssl_channel_credentials(_pem(self.ca_file), _pem(self.key_file), _pem(self.certificate_file))


def _pem(file: Path | None) -> bytes | None:
    if file is None:
        return None
    data = read_bytes(file, _MAX_BYTES * 16)
    # gRPC accepts any bytes; with a wrong file, connecting fails without a reason.
    if b"-----BEGIN " not in data:
        raise FailedPrecondition(f"{file.name} is no PEM file: expected a line that starts with -----BEGIN")
    return data
