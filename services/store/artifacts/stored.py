"""Artifact documents: an artifact's name, its size, and the key of its blob.

    {_id: digest, size, created_at, keep_until, key, block_bytes, blocks, damaged?, condemned_at?}

A key belongs to one upload and is never reused, so a late removal of a blob removes no other. Documents of an older
version have no key (their blobs are named by the digest alone) and no blocks.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson import Binary

from mesh.mongo import Document
from services.store.artifacts.blocks import Blocks

FOLDER = "artifacts"
"""Folder of the blobs of artifacts."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Artifact that is stored whole."""

    digest: str
    size: int
    created_at: datetime
    key: str
    blocks: Blocks | None = None
    """None: not computed yet, or not read."""


def new_key(digest: str) -> str:
    """Return a new key for the bytes of one upload."""
    return f"{FOLDER}/{digest[:2]}/{digest}.{uuid.uuid4().hex[:16]}"


def stored_of(doc: Mapping[str, Any]) -> Stored:
    """Return the artifact of a document."""
    digest: str = doc["_id"]
    blocks = Blocks(doc["block_bytes"], bytes(doc["blocks"])) if "blocks" in doc else None
    return Stored(digest, doc["size"], doc["created_at"], key_of(doc), blocks)


def key_of(doc: Mapping[str, Any]) -> str:
    """Return the key of the blob that a document refers to."""
    key: str = doc.get("key") or f"{FOLDER}/{doc['_id'][:2]}/{doc['_id']}"
    return key


def bytes_fields(key: str, blocks: Blocks) -> Document:
    """Return the fields for the blob's key and the digests of its blocks."""
    return {"key": key, **block_fields(blocks)}


def block_fields(blocks: Blocks) -> Document:
    """Return the fields for the digests of the blocks."""
    return {"block_bytes": blocks.block_bytes, "blocks": Binary(blocks.digests)}


def same_bytes(stored: Stored) -> Document:
    """Return the filter for the document, as long as it refers to the same blob as `stored`."""
    is_old = stored.key == key_of({"_id": stored.digest})
    return {"_id": stored.digest, "key": {"$exists": False} if is_old else stored.key}
