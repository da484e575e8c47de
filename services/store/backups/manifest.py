"""Manifest: the contents of a backup. Written last: a backup without a manifest is incomplete and cannot be restored.

blobs/3f/3f79...                          bytes by their SHA-256, shared by all backups of a location
backups/<id>/documents/<n>.bson.gz        documents, one after the other
backups/<id>/manifest.json                which collections, which files, which digests
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import DataLoss, FailedPrecondition

FORMAT = 1
FOLDER = "backups"
NAME = "manifest.json"
_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,119}")


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """File of documents in a backup."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DumpedCollection:
    """One collection in a backup."""

    database: str
    """Empty for the store's own database."""
    name: str
    documents: int
    parts: tuple[ManifestPart, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One complete backup."""

    id: str
    cluster_time: str
    """MongoDB's cluster time: the moment of all documents."""
    finished_at: str
    collections: tuple[DumpedCollection, ...]
    blobs: int
    blob_bytes: int
    missing: tuple[str, ...]
    """Digests of blobs that were damaged in the store."""

    @property
    def documents(self) -> int:
        return sum(dumped.documents for dumped in self.collections)


def is_id(text: str) -> bool:
    """Return True when `text` is the id of a backup: 20261126T163000Z-1a2b3c4d. Ids sort by time."""
    return _ID.fullmatch(text) is not None


def folder_of(backup_id: str) -> str:
    """Return the folder of a backup's files."""
    return f"{FOLDER}/{backup_id}"


def blob_key(sha256: str) -> str:
    """Return the key of a blob in a backup location."""
    return f"blobs/{sha256[:2]}/{sha256}"


def encoded(manifest: Manifest) -> bytes:
    """Return the manifest file: the manifest and its own digest, which reveals damage."""
    content = {
        "format": FORMAT,
        "id": manifest.id,
        "cluster_time": manifest.cluster_time,
        "finished_at": manifest.finished_at,
        "blobs": manifest.blobs,
        "blob_bytes": manifest.blob_bytes,
        "missing": list(manifest.missing),
        "collections": [
            {
                "database": dumped.database,
                "name": dumped.name,
                "documents": dumped.documents,
                "parts": [{"key": part.key, "size": part.size, "sha256": part.sha256} for part in dumped.parts],
            }
            for dumped in manifest.collections
        ],
    }
    return json.dumps({"sha256": _digest(content), "manifest": content}, indent=1).encode()


def decoded(data: bytes, backup_id: str) -> Manifest:
    """Return the manifest of a file.

    Raises:
        DataLoss: the file is damaged. FailedPrecondition: a newer version wrote it.
    """
    try:
        file = json.loads(data)
        content = file["manifest"]
        if file["sha256"] != _digest(content):
            raise ValueError("its digest")
        if content["format"] != FORMAT:
            raise FailedPrecondition(
                f"backup {backup_id} has format {content['format']}: restore it with a newer Shoal"
            )
        return _manifest(content, backup_id)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise DataLoss(f"backup {backup_id}: its manifest is damaged: choose another backup") from err


def _manifest(content: Mapping[str, Any], backup_id: str) -> Manifest:
    if content["id"] != backup_id:
        raise ValueError("of another backup")
    return Manifest(
        id=backup_id,
        cluster_time=str(content["cluster_time"]),
        finished_at=str(content["finished_at"]),
        collections=tuple(_dumped(each, backup_id) for each in content["collections"]),
        blobs=int(content["blobs"]),
        blob_bytes=int(content["blob_bytes"]),
        missing=tuple(_matched(_DIGEST, digest) for digest in content["missing"]),
    )


def _dumped(content: Mapping[str, Any], backup_id: str) -> DumpedCollection:
    parts = tuple(
        ManifestPart(_inside(part["key"], backup_id), int(part["size"]), _matched(_DIGEST, part["sha256"]))
        for part in content["parts"]
    )
    name = _matched(_COLLECTION, content["name"])
    if name.startswith("system."):
        raise ValueError("not ours")
    return DumpedCollection(str(content["database"]), name, int(content["documents"]), parts)


def _inside(key: str, backup_id: str) -> str:
    return _matched(re.compile(re.escape(folder_of(backup_id)) + r"/documents/[0-9]{1,9}\.bson\.gz"), key)


def _matched(form: re.Pattern[str], text: str) -> str:
    if not form.fullmatch(text):
        raise ValueError(text[:80])
    return text


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
