"""TLS of a client's connections: the files that the user names, read and checked when the client is made."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc

from shoal.errors import InvalidArgument

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Security:
    """TLS settings of a client."""

    context: ssl.SSLContext = field(repr=False)
    """For connections of mesh.rpc.client."""
    name: str = ""
    """Name that the server's certificate must have; empty: the one in the address."""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        """Return the same settings for a channel of grpc. Raises OSError."""
        ca, cert, key = (None if path is None else path.read_bytes() for path in (self.ca, self.cert, self.key))
        return grpc.ssl_channel_credentials(ca, key, cert)


def security(
    *, ca: PathLike | None = None, cert: PathLike | None = None, key: PathLike | None = None, name: str = ""
) -> Security:
    """Return the TLS settings of a client.

    Args:
        ca: PEM file of the authorities that the client trusts. None: those of the machine.
        cert, key: PEM files of the client's own certificate, where the server asks for one.
        name: the name that the server's certificate must have, where it is not the one in the address.

    Raises:
        InvalidArgument: a file cannot be read or used; the message names it.
    """
    if (cert is None) != (key is None):
        raise InvalidArgument("cert and key are given together: the client's certificate and its private key")
    try:
        context = ssl.create_default_context(cafile=_path(ca))
    except FileNotFoundError:
        raise InvalidArgument(f"ca={os.fspath(ca or '')!r}: no such file") from None
    except (OSError, ValueError) as err:
        raise InvalidArgument(f"ca={os.fspath(ca or '')!r}: no certificates in PEM form can be read ({err})") from err
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # `ca` may be the server's own certificate.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if cert is not None and key is not None:
        try:
            context.load_cert_chain(os.fspath(cert), os.fspath(key), password=_no_password)
        except FileNotFoundError:
            missing = next(path for path in (cert, key) if not os.path.exists(path))
            raise InvalidArgument(f"the client's certificate: {os.fspath(missing)!r}: no such file") from None
        except (OSError, ValueError) as err:
            files = f"{os.fspath(cert)!r} and {os.fspath(key)!r}"
            raise InvalidArgument(f"the client's certificate: {files} are no pair in PEM form ({err})") from err
    paths = (None if file is None else Path(file) for file in (ca, cert, key))
    return Security(context, name, *paths)


def _path(file: PathLike | None) -> str | None:
    return None if file is None else os.fspath(file)


def _no_password() -> str:
    # Without this, OpenSSL would ask on the terminal.
    raise ValueError("the key is encrypted")
