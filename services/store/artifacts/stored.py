"""An artifact as its document describes it: what it is called, how large it is, and where its bytes lie.

    {_id: digest, size, created_at, keep_until, key, block_bytes, blocks, damaged?, condemned_at?}

A key is of one upload and is never used again, so that whoever removes a blob, however late, removes no other.
Documents of an older version have no key (their blobs are called after the digest alone) and no blocks.
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
"""Where blobs of artifacts lie."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One artifact that is stored whole."""

    digest: str
    size: int
    created_at: datetime
    key: str
    blocks: Blocks | None = None
    """None: not made yet, or not read."""


def new_key(digest: str) -> str:
    """A key for the bytes of one upload."""
    return f"{FOLDER}/{digest[:2]}/{digest}.{uuid.uuid4().hex[:16]}"


def stored_of(doc: Mapping[str, Any]) -> Stored:
    """Reads a document."""
    digest: str = doc["_id"]
    blocks = Blocks(doc["block_bytes"], bytes(doc["blocks"])) if "blocks" in doc else None
    return Stored(digest, doc["size"], doc["created_at"], key_of(doc), blocks)


def key_of(doc: Mapping[str, Any]) -> str:
    """Where the bytes of a document lie."""
    key: str = doc.get("key") or f"{FOLDER}/{doc['_id'][:2]}/{doc['_id']}"
    return key


def bytes_fields(key: str, blocks: Blocks) -> Document:
    """The fields that say where an artifact's bytes lie, and how each part of them is verified."""
    return {"key": key, **block_fields(blocks)}


def block_fields(blocks: Blocks) -> Document:
    """The fields that say how each part of an artifact's bytes is verified."""
    return {"block_bytes": blocks.block_bytes, "blocks": Binary(blocks.digests)}


def same_bytes(stored: Stored) -> Document:
    """A filter for the document as long as it means the bytes that `stored` does."""
    is_old = stored.key == key_of({"_id": stored.digest})
    return {"_id": stored.digest, "key": {"$exists": False} if is_old else stored.key}
