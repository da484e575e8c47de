"""Certificates for tests: CAs, servers' pairs of them, and files in which an operator keeps a pair."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from shoal.node.tls.own_ca import OwnCa, open_ca
from shoal.node.tls.pair import Pair

NAMES = ("localhost", "127.0.0.1")


def now() -> datetime:
    return datetime.now(UTC)


def ca_in(folder: Path) -> OwnCa:
    """The CA of `folder`, which is made at the first use; clients trust its `path`."""
    return open_ca(folder, now())


def write_pair(folder: Path, pair: Pair) -> tuple[Path, Path]:
    """Writes the pair as an operator's files, and returns their paths."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / "server.pem", folder / "server.key"
    cert.write_bytes(pair.chain)
    key.touch(mode=0o600)
    key.write_bytes(pair.key)
    return cert, key


def issued(folder: Path, names: Iterable[str] = NAMES) -> tuple[Path, Path, Path]:
    """Files of a server's certificate, its key, and the CA of `folder` that signed it."""
    ca = ca_in(folder)
    return (*write_pair(folder / "server", ca.issue(names, now())), ca.path)


def written(
    path: Path, ca: OwnCa | None = None, *, days: tuple[int, int] = (-1, 1), names: Iterable[str] = ("localhost",)
) -> tuple[Path, Path]:
    """Files `path`.pem and .key of a certificate of `ca` (None: self-signed), valid for these days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, path.name)])
    issuer, signer = (subject, key) if ca is None else (ca.certificate.subject, ca.key)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now() + timedelta(days=days[0])).not_valid_after(now() + timedelta(days=days[1]))
    if alternatives := [x509.DNSName(name) for name in names]:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    cert, file = path.with_suffix(".pem"), path.with_suffix(".key")
    cert.write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert, file
