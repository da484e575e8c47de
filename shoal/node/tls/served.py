"""The folder from which Envoy takes the pair in use, and the watch that replaces the pair when it is renewed.

FOLDER/sds.json     Envoy's secret: names the files below, and FOLDER as the watched directory
       current ──>  7/tls.crt, 7/tls.key

Envoy reads both files anew when `current` is renamed over, so it never sees two halves of different pairs. Connections
and streams go on; new connections get the new certificate. Envoy itself reloads nothing that is not in such a folder.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from mesh.process.files import write_atomically
from mesh.xds.tls import SECRET
from shoal.errors import InvalidArgument
from shoal.node.tls import own_ca
from shoal.node.tls.own_ca import OwnCa
from shoal.node.tls.pair import Pair, read_pair

CHECK_S = 2.0
"""Interval of checks of the files. A renewal is served after two of them: the files must stay the same in between."""
# A certificate of the own CA is renewed when this much of its life is left.
_RENEW_BEFORE = timedelta(days=own_ca.LEAF_DAYS / 3)
_WARN_BEFORE = timedelta(days=7)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class TlsOptions:
    """The certificate of the address for clients, as the command line asks for it."""

    cert: Path | None = None
    """None: a certificate of the own CA."""
    key: Path | None = None
    names: tuple[str, ...] = ()
    """With the own CA: names for the certificate, beside the machine's."""


@dataclass(frozen=True)
class Trust:
    """Data with which a client checks the served certificate."""

    ca: str
    """File of the CA's certificate, or of the operator's chain."""
    name: str
    """A name that the certificate is valid for."""
    fingerprint: str
    """SHA-256 of the own CA's certificate, or of the operator's certificate."""
    has_own_ca: bool


class Source(Protocol):
    """Origin of pairs."""

    def first(self) -> Pair:
        """Return the pair to begin with. Raises InvalidArgument."""

    def renewed(self, current: Pair) -> Pair | None:
        """Return the pair that replaces `current`; None while there is none. Raises InvalidArgument, once a cause."""

    def trust(self, pair: Pair) -> Trust: ...


class Files:
    """The operator's files, read again after each change."""

    def __init__(self, cert: Path, key: Path, clock: Callable[[], datetime] = utc_now) -> None:
        self._cert, self._key, self._clock = cert, key, clock
        self._seen = self._taken = self._signature()
        self._said = ""

    def first(self) -> Pair:
        return read_pair(self._cert, self._key, self._clock())

    def renewed(self, current: Pair) -> Pair | None:
        signature = self._signature()
        if signature == self._taken:
            return None
        if signature != self._seen:
            # The other file, or the rest of this one, may follow.
            self._seen = signature
            return None
        try:
            pair = read_pair(self._cert, self._key, self._clock())
        except InvalidArgument as err:
            # It is read again: a certificate becomes valid, although its file stays the same.
            if err.message == self._said:
                return None
            self._said = err.message
            raise
        self._taken, self._said = signature, ""
        return None if (pair.chain, pair.key) == (current.chain, current.key) else pair

    def trust(self, pair: Pair) -> Trust:
        return Trust(str(self._cert), pair.name, pair.fingerprint, has_own_ca=False)

    def _signature(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_signature(path) for path in (self._cert, self._key))


def _signature(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


class Issued:
    """Certificates of the own CA, renewed before they expire, and when another CA is in its place or it was moved."""

    def __init__(self, ca: OwnCa, names: list[str], clock: Callable[[], datetime] = utc_now) -> None:
        self._ca, self._names, self._clock = ca, names, clock
        self._seen = self._taken = self._signature()
        self._said = ""

    def first(self) -> Pair:
        return self._ca.issue(self._names, self._clock())

    def renewed(self, current: Pair) -> Pair | None:
        now = self._clock()
        if (other := self._other_ca(now)) is not None:
            self._ca = other
            return other.issue(self._names, now)
        ends_at = self._ca.certificate.not_valid_after_utc
        # A certificate never outlives the CA.
        if current.not_after - now > _RENEW_BEFORE or current.not_after >= ends_at or now >= ends_at:
            return None
        return self._ca.issue(self._names, now)

    def _other_ca(self, now: datetime) -> OwnCa | None:
        """Return the CA in place of the one in use, a new one when that was moved away; None without another one."""
        before, self._seen = self._seen, self._signature()
        # While its files are copied, they change from one check to the next.
        if self._seen == self._taken or self._seen != before:
            return None
        try:
            found = own_ca.open_ca(self._ca.path.parent.parent, now)
        except InvalidArgument as err:
            if err.message == self._said:
                return None
            self._said = err.message
            raise
        self._seen = self._taken = self._signature()
        self._said = ""
        return None if found.certificate == self._ca.certificate else found

    def trust(self, pair: Pair) -> Trust:
        return Trust(str(self._ca.path), pair.name, self._ca.fingerprint, has_own_ca=True)

    def _signature(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_signature(path) for path in (self._ca.path, self._ca.path.with_name(own_ca.KEY)))


def source_of(options: TlsOptions, host: str, data_dir: Path) -> Source:
    """Return the source of the pairs that a command line asks for. `host` is the address to listen at.

    Raises:
        InvalidArgument: the own CA cannot be used.
    """
    if options.cert is not None and options.key is not None:
        return Files(options.cert, options.key)
    ca = own_ca.open_ca(data_dir, utc_now())
    return Issued(ca, own_ca.names_of_machine(host, options.names))


class ServedCertificate:
    """The pair that Envoy serves. `folder` is private to the process.

    Raises:
        InvalidArgument: the first pair is invalid; nothing was written.
    """

    def __init__(self, folder: Path, source: Source, clock: Callable[[], datetime] = utc_now) -> None:
        self._folder, self._source, self._clock = folder, source, clock
        self.pair = source.first()
        self._generation = 0
        self._warned: Pair | None = None
        folder.mkdir(mode=0o700)
        self._write()
        (folder / "sds.json").write_text(json.dumps(self._secret()))

    @property
    def sds(self) -> Path:
        """File of Envoy's secret."""
        return self._folder / "sds.json"

    @property
    def trust(self) -> Trust:
        return self._source.trust(self.pair)

    async def keep(self, report: Callable[[str], None]) -> None:
        """Serve each renewed pair, until cancelled. `report` gets a text when a pair cannot be used or expires soon."""
        while True:
            await asyncio.sleep(CHECK_S)
            self.check(report)

    def check(self, report: Callable[[str], None]) -> None:
        """Serve the renewed pair, if there is one."""
        try:
            pair = self._source.renewed(self.pair)
            if pair is not None:
                self.pair = pair
                self._write()
                report(f"a renewed certificate is served: valid until {pair.not_after:%Y-%m-%d %H:%M} UTC")
        except InvalidArgument as err:
            report(f"the renewed certificate is not used, and the former one is served on: {err.message}")
        except OSError as err:
            report(f"the renewed certificate cannot be written, and the former one is served on: {err}")
        if self.pair.not_after - self._clock() < _WARN_BEFORE and self._warned is not self.pair:
            self._warned = self.pair
            trust = self.trust
            remedy = "renew it"
            if trust.has_own_ca:
                folder = Path(trust.ca).parent
                remedy = f"so does its CA: move {folder} away for a new CA, and give clients that (`shoal ca show`)"
            report(f"the certificate expires at {self.pair.not_after:%Y-%m-%d %H:%M} UTC: {remedy}")

    def _write(self) -> None:
        self._generation += 1
        new = self._folder / str(self._generation)
        new.mkdir(mode=0o700)
        write_atomically(new / "tls.crt", self.pair.chain, is_private=True)
        write_atomically(new / "tls.key", self.pair.key, is_private=True)
        link = self._folder / "next"
        link.unlink(missing_ok=True)
        link.symlink_to(new.name)
        link.replace(self._folder / "current")
        # Envoy may be reading the last one.
        shutil.rmtree(self._folder / str(self._generation - 2), ignore_errors=True)

    def _secret(self) -> dict[str, object]:
        current = self._folder / "current"
        certificate = {
            "certificate_chain": {"filename": str(current / "tls.crt")},
            "private_key": {"filename": str(current / "tls.key")},
            "watched_directory": {"path": str(self._folder)},
        }
        kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
        secret = {"@type": kind, "name": SECRET, "tls_certificate": certificate}
        return {"version_info": "1", "resources": [secret]}
