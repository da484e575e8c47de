"""Certificates are checked before Envoy gets them, the own CA is made once, and renewed pairs are taken over."""

from __future__ import annotations

import json
import os
import ssl
import stat
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from shoal.errors import InvalidArgument
from shoal.node.tls import own_ca
from shoal.node.tls.own_ca import names_of_machine, open_ca
from shoal.node.tls.pair import read_pair
from shoal.node.tls.served import Files, Issued, ServedCertificate
from tests.certificates import NAMES, ca_in, issued, now, write_pair, written


def test_a_pair_is_read_with_a_name_of_its_certificate(tmp_path: Path) -> None:
    cert, key, _ = issued(tmp_path, ["*.example.com", "127.0.0.1"])
    pair = read_pair(cert, key, now())
    assert (pair.chain, pair.key, pair.name) == (cert.read_bytes(), key.read_bytes(), "shoal.example.com")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)


@pytest.mark.parametrize(
    ("cert", "key", "named"),
    [
        ("none.pem", "server.key", r"--tls-cert \S*none\.pem does not exist"),
        (".", "server.key", r"--tls-cert \S* is no plain file"),
        ("server.pem", "none.key", r"--tls-key \S*none\.key does not exist"),
        ("server.key", "server.key", r"--tls-cert \S*: no certificate in PEM form"),
        ("server.pem", "server.pem", r"--tls-key \S*server\.pem: other users can read or write the key .*chmod 600"),
        ("server.pem", "junk", r"--tls-key \S*junk: no private key in PEM form"),
        ("server.pem", "encrypted", r"--tls-key \S*encrypted: the key is encrypted"),
        ("server.pem", "other.key", r"--tls-key \S*other\.key: the key belongs to another certificate"),
        ("old.pem", "old.key", r"--tls-cert \S*old\.pem: the certificate expired at \d{4}-"),
        ("future.pem", "future.key", r"--tls-cert \S*future\.pem: the certificate is valid only from \d{4}-"),
        ("nameless.pem", "nameless.key", r"--tls-cert \S*nameless\.pem: the certificate has no subject alternative"),
        ("big", "server.key", r"--tls-cert \S*big: larger than 1 MiB"),
    ],
)
def test_a_wrong_file_is_named_with_the_remedy(tmp_path: Path, cert: str, key: str, named: str) -> None:
    ca = ca_in(tmp_path)
    folder = tmp_path / "server"
    write_pair(folder, ca.issue(NAMES, now()))
    (folder / "other.key").touch(mode=0o600)
    (folder / "other.key").write_bytes(ca.issue(NAMES, now()).key)
    write_others(folder)
    with pytest.raises(InvalidArgument, match=named):
        read_pair(folder / cert, folder / key, now())


def write_others(folder: Path) -> None:
    """Files of no use: expired, not yet valid, encrypted, without a name, no PEM."""
    written(folder / "old", days=(-2, -1))
    written(folder / "future", days=(1, 2))
    written(folder / "nameless", names=())
    encryption = BestAvailableEncryption(b"secret")
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    for name, content in (("encrypted", key), ("junk", b"junk"), ("big", bytes((1 << 20) + 1))):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    cert, key, _ = issued(tmp_path)
    for mode in (0o604, 0o620, 0o660) if os.getuid() == 0 else (0o640, 0o604):
        key.chmod(mode)
        with pytest.raises(InvalidArgument, match=rf"other users can read or write the key \(mode {mode:04o}\)"):
            read_pair(cert, key, now())
    for mode in (0o600, 0o400):
        key.chmod(mode)
        read_pair(cert, key, now())


def test_the_own_ca_is_made_once_and_private(tmp_path: Path) -> None:
    first, second = open_ca(tmp_path, now()), open_ca(tmp_path, now())
    assert first.certificate == second.certificate
    assert first.fingerprint == second.fingerprint
    assert [stat.S_IMODE((tmp_path / "ca" / name).stat().st_mode) for name in ("ca.pem", "ca.key")] == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert first.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_a_damaged_ca_is_never_replaced(tmp_path: Path) -> None:
    folder = open_ca(tmp_path, now()).path.parent
    (folder / "ca.pem").unlink()
    with pytest.raises(InvalidArgument, match=r"the CA in \S* cannot be read .*restore it from a copy, or remove"):
        open_ca(tmp_path, now())
    other = open_ca(tmp_path / "other", now())
    (folder / "ca.pem").write_bytes(other.path.read_bytes())
    with pytest.raises(InvalidArgument, match="belongs to another certificate"):
        open_ca(tmp_path, now())
    (folder / "ca.key").chmod(0o644)
    with pytest.raises(InvalidArgument, match=r"--tls auto: the CA's key \S*ca\.key: other users can read"):
        open_ca(tmp_path, now())
    other.path.with_name("ca.key").chmod(0o600)
    with pytest.raises(InvalidArgument, match="has expired"):
        open_ca(tmp_path / "other", now() + timedelta(days=3651))


def test_the_certificate_of_a_wildcard_address_has_the_machines_names_and_the_users() -> None:
    for host in ("0.0.0.0", "::"):
        names = names_of_machine(host, ["shoal.example.com"])
        assert names[0] == "shoal.example.com"
        assert {"localhost", "127.0.0.1", "::1"} <= set(names)
    assert "10.1.2.3" in names_of_machine("10.1.2.3")


class Clock:
    def __init__(self) -> None:
        self.now = now()

    def __call__(self) -> datetime:
        return self.now


def served_serial(served: ServedCertificate) -> int:
    return x509.load_pem_x509_certificate((served.sds.parent / "current" / "tls.crt").read_bytes()).serial_number


def test_the_own_certificate_is_renewed_when_a_third_of_its_life_is_left(tmp_path: Path) -> None:
    clock, said = Clock(), []
    served = ServedCertificate(tmp_path / "tls", Issued(ca_in(tmp_path), list(NAMES), clock), clock)
    first = served_serial(served)
    clock.now += timedelta(days=own_ca.LEAF_DAYS * 2 / 3 - 1)
    served.check(said.append)
    assert (served_serial(served), said) == (first, [])
    clock.now += timedelta(days=1)
    served.check(said.append)
    assert served_serial(served) != first
    assert "a renewed certificate is served" in said[0]
    served.check(said.append)
    assert len(said) == 1


def test_a_certificate_that_lasts_as_long_as_the_ca_is_not_renewed_for_ever(tmp_path: Path) -> None:
    clock, said = Clock(), []
    ca = ca_in(tmp_path)
    clock.now = ca.certificate.not_valid_after_utc - timedelta(days=2)
    served = ServedCertificate(tmp_path / "tls", Issued(ca, list(NAMES), clock), clock)
    first = served_serial(served)
    for _ in range(3):
        served.check(said.append)
    assert served_serial(served) == first
    assert [text.partition(" at ")[0] for text in said] == ["the certificate expires"]


def test_a_ca_that_was_moved_away_is_replaced_while_the_node_serves(tmp_path: Path) -> None:
    clock, said = Clock(), []
    ca = ca_in(tmp_path)
    # It has ended, as on a node that has run for ten years.
    clock.now = ca.certificate.not_valid_after_utc - timedelta(seconds=1)
    served = ServedCertificate(tmp_path / "tls", Issued(ca, list(NAMES), clock), clock)
    clock.now += timedelta(days=1)
    first = served_serial(served)
    for _ in range(3):
        served.check(said.append)
    assert (served_serial(served), len(said)) == (first, 1)
    assert f"move {tmp_path / 'ca'} away" in said[0]
    (tmp_path / "ca").rename(tmp_path / "ca.old")
    served.check(said.append)
    assert served_serial(served) == first
    served.check(said.append)
    assert served_serial(served) != first
    new = open_ca(tmp_path, clock.now)
    assert served.trust.fingerprint == new.fingerprint != ca.fingerprint
    assert served.pair.not_after - clock.now == timedelta(days=own_ca.LEAF_DAYS)
    for _ in range(3):
        served.check(said.append)
    assert ["a renewed certificate is served" in text for text in said] == [False, True]


def test_a_damaged_ca_is_named_once_and_its_copy_changes_nothing(tmp_path: Path) -> None:
    ca, said = ca_in(tmp_path), []
    served = ServedCertificate(tmp_path / "tls", Issued(ca, list(NAMES)))
    first = served_serial(served)
    text = ca.path.read_bytes()
    ca.path.unlink()
    for _ in range(4):
        served.check(said.append)
    assert ["cannot be read" in one and "the former one is served on" in one for one in said] == [True]
    ca.path.write_bytes(text)
    for _ in range(4):
        served.check(said.append)
    assert (served_serial(served), len(said)) == (first, 1)
    assert served.trust.fingerprint == open_ca(tmp_path, now()).fingerprint


def test_renewed_files_are_taken_over_once_both_are_there_and_wrong_ones_never(tmp_path: Path) -> None:
    ca, said = ca_in(tmp_path), []
    cert, key = write_pair(tmp_path / "server", ca.issue(NAMES, now()))
    served = ServedCertificate(tmp_path / "tls", Files(cert, key))
    first = served_serial(served)
    assert json.loads(served.sds.read_text())["resources"][0]["name"] == "gateway"
    assert stat.S_IMODE((served.sds.parent / "current" / "tls.key").stat().st_mode) == 0o600
    pair = ca.issue(NAMES, now())
    cert.write_bytes(pair.chain)
    served.check(said.append)
    # The key follows before the next check, so the half of a pair is never read.
    key.write_bytes(pair.key)
    served.check(said.append)
    assert (served_serial(served), said) == (first, [])
    served.check(said.append)
    assert served_serial(served) != first
    assert ["a renewed certificate is served" in text for text in said] == [True]

    second = served_serial(served)
    cert.write_text("junk")
    for _ in range(4):
        served.check(said.append)
    assert served_serial(served) == second
    assert ["the former one is served on: --tls-cert" in text for text in said[1:]] == [True], "told once"
    cert.unlink()
    write_pair(tmp_path / "server", ca.issue(NAMES, now()))
    served.check(said.append)
    served.check(said.append)
    assert served_serial(served) != second
    assert (served.sds.parent / "current").is_symlink()
    assert len([each for each in served.sds.parent.iterdir() if each.is_dir() and not each.is_symlink()]) <= 2


def test_a_renewed_certificate_that_is_valid_in_a_moment_is_served_then(tmp_path: Path) -> None:
    clock, said = Clock(), []
    ca = ca_in(tmp_path)
    cert, key = write_pair(tmp_path / "server", ca.issue(NAMES, now()))
    served = ServedCertificate(tmp_path / "tls", Files(cert, key, clock))
    first = served_serial(served)
    # The clock of the issuer is ahead by more than an hour, by which it backdates.
    write_pair(tmp_path / "server", ca.issue(NAMES, now() + timedelta(hours=2)))
    for _ in range(5):
        served.check(said.append)
    assert served_serial(served) == first
    assert ["is valid only from" in text for text in said] == [True], "told once"
    clock.now += timedelta(hours=2)
    served.check(said.append)
    assert served_serial(served) != first
