"""Certificates for tests: CAs, servers' pairs of them, and files in which an operator keeps a pair."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

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
