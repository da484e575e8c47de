"""Certificate chain and private key of a server: read from files and checked, so that Envoy never gets a wrong pair."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from shoal.errors import InvalidArgument

# A chain has a few kB. A larger file is a wrong one.
_LARGEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Pair:
    """A server's certificate chain and key, as PEM."""

    chain: bytes
    key: bytes
    name: str
    """A name or address that the certificate is valid for."""
    not_after: datetime
    fingerprint: str
    """SHA-256 of the server's certificate."""


def read_pair(cert: Path, key: Path, now: datetime) -> Pair:
    """Read and check the files of `--tls-cert` and `--tls-key`.

    Raises:
        InvalidArgument: a file cannot be read or has no certificate or key, other users can read the key, the key
            belongs to another certificate, or the certificate is not valid at `now`. The message says what to do.
    """
    return checked(_read("--tls-cert", cert), read_key("--tls-key", key), now, f"--tls-cert {cert}", f"--tls-key {key}")


def checked(chain: bytes, key: bytes, now: datetime, about_chain: str, about_key: str) -> Pair:
    """Return the pair of `chain` and `key`.

    Raises:
        InvalidArgument: `about_chain` or `about_key` is the subject of its message.
    """
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as err:
        raise InvalidArgument(f"{about_chain}: no certificate in PEM form") from err
    try:
        private = load_pem_private_key(key, None)
    except TypeError as err:
        raise InvalidArgument(f"{about_key}: the key is encrypted: give a file without a password") from err
    except (ValueError, UnsupportedAlgorithm) as err:
        raise InvalidArgument(f"{about_key}: no private key in PEM form") from err
    if _public(private.public_key()) != _public(leaf.public_key()):
        raise InvalidArgument(
            f"{about_key}: the key belongs to another certificate than the first one of {about_chain}: "
            "give the files of one pair, with the server's own certificate first"
        )
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        verb = "expired at" if now >= leaf.not_valid_after_utc else "is valid only from"
        at = leaf.not_valid_after_utc if now >= leaf.not_valid_after_utc else leaf.not_valid_before_utc
        raise InvalidArgument(f"{about_chain}: the certificate {verb} {at:%Y-%m-%d %H:%M} UTC: renew it")
    return Pair(chain, key, _name(leaf, about_chain), leaf.not_valid_after_utc, fingerprint(leaf))


def read_key(option: str, path: Path) -> bytes:
    """Return the content of the key file `path` of `option`.

    Raises:
        InvalidArgument: the file cannot be read, or users other than its owner can read it. A file of root may also be
            readable by its group, as services share keys on a machine.
    """
    content = _read(option, path)
    status = path.stat()
    if status.st_mode & (0o027 if status.st_uid == 0 else 0o077):
        mode = stat.S_IMODE(status.st_mode)
        raise InvalidArgument(
            f"{option} {path}: other users can read or write the key (mode {mode:04o}): chmod 600 {path}"
        )
    return content


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate, as openssl prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _read(option: str, path: Path) -> bytes:
    try:
        if not path.is_file():
            what = "is no plain file" if os.path.lexists(path) else "does not exist"
            raise InvalidArgument(f"{option} {path} {what}")
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as err:
        raise InvalidArgument(f"{option} {path}: cannot be read: {err.strerror}") from err
    if len(content) > _LARGEST_FILE_BYTES:
        raise InvalidArgument(f"{option} {path}: larger than 1 MiB, so it is no PEM file of a certificate or key")
    return content


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _name(leaf: x509.Certificate, about: str) -> str:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    except ValueError as err:
        raise InvalidArgument(f"{about}: the certificate cannot be read: {err}") from err
    dns = names.get_values_for_type(x509.DNSName)
    found = [*dns, *map(str, names.get_values_for_type(x509.IPAddress))]
    if not found:
        raise InvalidArgument(
            f"{about}: the certificate has no subject alternative name (DNS, IP), so clients reject it: make a new one"
        )
    return found[0].replace("*", "shoal", 1)
