"""Keyring: encrypts the secrets that a cluster keeps in etcd, each purpose with a key of its own from one master key.

    master key ──HKDF──> key of the purpose ──AES-256-GCM──> sealed secret

The master key is not in etcd. Who has etcd's data without it has no secret.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MASTER_BYTES = 32
_NONCE_BYTES = 12
# Size of a file of a master key that is read.
_FILE_BYTES = 4096


class Keyring:
    """Seals and opens secrets. `source` says where the master key comes from, for people."""

    def __init__(self, master: bytes, source: str) -> None:
        self._master = master
        self.source = source

    def seal(self, purpose: str, secret: bytes) -> bytes:
        """Return `secret` encrypted, for storage."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher(purpose).encrypt(nonce, secret, purpose.encode())

    def open(self, purpose: str, sealed: bytes) -> bytes:
        """Return a secret that was sealed for `purpose`.

        Raises:
            FailedPrecondition: it was sealed with another master key or for another purpose, or has changed.
        """
        from cryptography.exceptions import InvalidTag

        nonce, data = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher(purpose).decrypt(nonce, data, purpose.encode())
        except (InvalidTag, ValueError):
            raise FailedPrecondition(
                f"the {purpose} in etcd cannot be opened with the master key of the {self.source}: start the node with "
                "the master key that the cluster began with"
            ) from None

    def _cipher(self, purpose: str) -> AESGCM:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        key = HKDF(hashes.SHA256(), 32, salt=None, info=f"shoal keyring: {purpose}".encode()).derive(self._master)
        return AESGCM(key)


def new_master() -> str:
    """Return a new master key, as the text of its file."""
    return base64.b64encode(secrets.token_bytes(MASTER_BYTES)).decode() + "\n"


def read(path: Path, source: str = "") -> Keyring:
    """Return the keyring of the master key in a file: 32 bytes or more in base64, as of `openssl rand -base64 32`.

    Raises:
        InvalidArgument: the file cannot be read, others than its owner can read it, or it has no such key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_FILE_BYTES)
    except OSError as err:
        raise InvalidArgument(f"cannot read the master key {path}: {err.strerror}") from err
    if mode & 0o077:
        raise InvalidArgument(f"the master key {path} can be read by others (mode {mode:04o}): chmod 600 {path}")
    return Keyring(_decoded(text, str(path)), source or f"file {path}")


def check_text(text: str, source: str) -> None:
    """Raise InvalidArgument when `text` is no master key."""
    _decoded(text.encode(), source)


def _decoded(text: bytes, source: str) -> bytes:
    try:
        master = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        master = b""
    if len(master) < MASTER_BYTES:
        raise InvalidArgument(
            f"{source} is no master key: expected {MASTER_BYTES} bytes in base64, as `openssl rand -base64 32` prints"
        )
    return master
