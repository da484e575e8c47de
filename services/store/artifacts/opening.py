"""Opening of the blob store that a URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from mesh.process.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.local_blobs import LocalBlobs
from services.store.artifacts.object_blobs import ObjectBlobs, open_object_store


def open_blobs(url: str, staging: Path | None, threads: Threads, *, checksums: bool = True) -> tuple[BlobStore, Path]:
    """Return the blob store at `url` and the local folder of its unfinished uploads. Makes the folders.

    `checksums`: send checksums to S3, which compares them with the received bytes.

    Raises:
        OSError: a folder cannot be made.
    """
    if url.startswith("file://"):
        root = Path(unquote(urlsplit(url).path))
        staging = root / "staging"
        disk.make_folder(staging)
        return LocalBlobs(root, staging, threads), staging
    # StoreConfig guarantees a folder for object stores.
    assert staging is not None
    disk.make_folder(staging)
    return ObjectBlobs(open_object_store(url, checksums=checksums)), staging
