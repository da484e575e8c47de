"""The node's own CA, for `--tls auto`: made once, kept in the data folder, and the issuer of short-lived certificates.

DATA_DIR/ca/ca.pem   the CA's certificate, for clients: `shoal ca show`
            ca.key   its key, mode 0600
            lock     held while the CA is made
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.process.files import write_atomically
from shoal.errors import InvalidArgument
from shoal.node.folder import locked
from shoal.node.tls.pair import Pair, checked, fingerprint, read_key

FOLDER, CERTIFICATE, KEY = "ca", "ca.pem", "ca.key"

# Clients install the CA's certificate by hand, so it lasts.
_CA_DAYS = 3650
LEAF_DAYS = 90
"""Life of a server's certificate. Some clients reject those of more than 397 days."""
# A clock of a client may be a little behind.
_BACKDATED = timedelta(hours=1)


@dataclass(frozen=True)
class OwnCa:
    """The CA of a data folder."""

    path: Path
    """File of the CA's certificate."""
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA's certificate."""
        return fingerprint(self.certificate)

    def issue(self, names: Iterable[str], now: datetime) -> Pair:
        """Return a new certificate for `names` (DNS names and IP addresses) with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        until = min(now + timedelta(days=LEAF_DAYS), self.certificate.not_valid_after_utc)
        leaf = (
            _builder("shoal gateway", self.certificate.subject, key.public_key(), now, until)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        chain = leaf.public_bytes(Encoding.PEM) + self.certificate.public_bytes(Encoding.PEM)
        return checked(chain, _pem(key), now, "the certificate of --tls auto", "the key of --tls auto")


def open_ca(data_dir: Path, now: datetime) -> OwnCa:
    """Return the CA of `data_dir`; make it at the first use.

    Raises:
        InvalidArgument: the CA's files are damaged, do not belong together, are expired or readable by others, or
            cannot be written.
    """
    folder = data_dir / FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / CERTIFICATE).exists() and not (folder / KEY).exists():
                _make(folder, now)
    except OSError as err:
        raise InvalidArgument(f"--tls auto: the CA in {folder} cannot be made: {err.strerror}") from err
    return _load(folder, now)


def names_of_machine(host: str, extra: Iterable[str] = ()) -> list[str]:
    """Return the names and addresses by which clients may call a server that listens at `host`, and `extra`."""
    found = [*extra, "localhost", socket.gethostname(), "127.0.0.1", "::1"]
    if not _is_wildcard(host):
        found.append(host)
    else:
        found += _own_addresses()
    # A machine's name may have characters that no certificate carries.
    return list(dict.fromkeys(name for name in found if name and name.isascii() and "_" not in name))


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _own_addresses() -> list[str]:
    """Return the addresses of the network interfaces (proc(5), /proc/net/fib_trie and if_inet6)."""
    found, last = [], ""
    with contextlib.suppress(OSError), open("/proc/net/fib_trie") as lines:
        for line in lines:
            if "|--" in line:
                last = line.split()[-1]
            elif "host LOCAL" in line:
                found.append(last)
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as lines:
        found += [str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))) for line in lines]
    return found


def _make(folder: Path, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    # The random part distinguishes the CAs of several nodes in a client's list.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Shoal CA {os.urandom(4).hex()}")])
    certificate = (
        _builder(name, name, public, now, now + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    # The certificate is written last: after a kill in between, the key without a certificate is named as an error.
    write_atomically(folder / KEY, _pem(key), is_private=True)
    write_atomically(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM), is_private=True)


def _load(folder: Path, now: datetime) -> OwnCa:
    remedy = f"restore it from a copy, or remove {folder} for a new CA that clients must be given again"
    try:
        certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
        key = load_pem_private_key(read_key("the CA's key", folder / KEY), None)
    except InvalidArgument as err:
        raise InvalidArgument(f"--tls auto: {err.message}") from err
    except (OSError, ValueError, TypeError) as err:
        raise InvalidArgument(f"--tls auto: the CA in {folder} cannot be read ({err}): {remedy}") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise InvalidArgument(f"--tls auto: the CA's key in {folder} belongs to another certificate: {remedy}")
    if now >= certificate.not_valid_after_utc:
        raise InvalidArgument(f"--tls auto: the CA in {folder} has expired: {remedy}")
    return OwnCa(folder / CERTIFICATE, certificate, key)


def _builder(
    subject: str | x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    if isinstance(subject, str):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(until)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
