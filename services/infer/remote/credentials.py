"""What a remote server is shown: the headers of each call, and the files of TLS. Secrets stay out of the repository.

${env:NAME}    an environment variable of the server
${file:PATH}   the text of a file, without the white space around it; from the model's folder, or absolute
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
_MOST_BYTES = 64 << 10


@dataclass(frozen=True)
class Headers:
    """The headers of every call, as they are written: read anew when the remote server does not accept them."""

    written: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)
    environ: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> tuple[tuple[str, str], ...]:
        """Names and values. Raises FailedPrecondition that names the parameter, and shows no secret."""
        return tuple((name, self._value(name, text)) for name, text in self.written.items())

    def _value(self, name: str, text: str) -> str:
        what = f"parameter metadata.{name}"
        value = _REFERENCE.sub(lambda found: self._referred(found[1], found[2], what), text)
        if not _VALUE.fullmatch(value):
            raise FailedPrecondition(f"{what}: expected printable ASCII, at least one character")
        return value

    def _referred(self, kind: str, name: str | None, what: str) -> str:
        if kind not in ("env", "file") or not name:
            raise FailedPrecondition(
                f"{what}: expected ${{env:NAME}} or ${{file:PATH}} after a dollar sign and a brace"
            )
        if kind == "env":
            if name not in self.environ:
                raise FailedPrecondition(f"{what}: the environment variable {quoted(name)} is not set")
            return self.environ[name]
        try:
            return read_text(self.folder / name, _MOST_BYTES).strip()
        except FailedPrecondition as err:
            raise FailedPrecondition(f"{what}: {err.message}") from err


def check_name(name: str) -> None:
    """Raises FailedPrecondition when no header can be called so."""
    if not _NAME.fullmatch(name) or name.endswith("-bin"):
        raise FailedPrecondition(
            f"parameter metadata.{name[:128]}: expected the name of a header in lower case, not one of bytes (-bin)"
        )
    if any(name == reserved or (reserved.endswith("-") and name.startswith(reserved)) for reserved in _RESERVED):
        raise FailedPrecondition(f"parameter metadata.{name}: this header is gRPC's own")


@dataclass(frozen=True)
class Tls:
    """The files of a connection through TLS, in PEM."""

    ca_file: Path | None = None
    """Who may sign the server's certificate; None: whom gRPC trusts by itself."""
    certificate_file: Path | None = None
    key_file: Path | None = None
    """What the server is shown, where it asks who calls."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises FailedPrecondition when a file cannot be read."""
        return grpc.ssl_channel_credentials(_pem(self.ca_file), _pem(self.key_file), _pem(self.certificate_file))


def _pem(file: Path | None) -> bytes | None:
    if file is None:
        return None
    data = read_bytes(file, _MOST_BYTES * 16)
    # gRPC takes anything, and says nothing when it cannot use it but that no connection comes about.
    if b"-----BEGIN " not in data:
        raise FailedPrecondition(f"{file.name} is no PEM file: expected a line that starts with -----BEGIN")
    return data
