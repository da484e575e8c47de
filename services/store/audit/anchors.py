"""Anchors of the audit log: the ends of all chains at one time, stored as blobs, outside of MongoDB.

    anchor n = {n, at, previous: SHA-256 of anchor n - 1, oldest: number of the oldest anchor kept,
                chains: {writer: [first, hash before first, last, hash of last]}}

An anchor proves that the entries up to its ends existed, and as they were: whoever cuts off or rewrites a chain in
MongoDB would have to change every later anchor too, in two places. Retention first writes an anchor with the new first
entries, then removes those before: nothing else may be missing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from pymongo.errors import DuplicateKeyError

from mesh.mongo import translated
from mesh.mongo_clock import Clock, milliseconds
from services.store.artifacts.blobs import BlobStore
from services.store.audit import chains
from services.store.audit.chains import Extent
from services.store.audit.entries import FIRST_HASH
from services.store.documents import Collections
from shoal.errors import DataLoss, NotFound

FOLDER = "audit"
"""Folder of the anchors' blobs."""
MAX_ANCHOR_BYTES = 4 << 20
"""An anchor of 20,000 chains."""
# Somebody may have written others by hand, such as a text, which sorts behind every number.
_NUMBERED: Mapping[str, Any] = {"_id": {"$type": ["int", "long"], "$gte": 1, "$lt": 10**10}}
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(rf"{FOLDER}/(\d{{10}})-([0-9a-f]{{64}})")


@dataclass(frozen=True, slots=True)
class Anchor:
    """Extents of all chains at one time."""

    n: int
    at_ms: int
    previous: str
    oldest: int
    chains: Mapping[str, Extent]

    def encode(self) -> bytes:
        """Return the anchor's bytes, the same for equal anchors."""
        content = {
            "n": self.n,
            "at": self.at_ms,
            "previous": self.previous,
            "oldest": self.oldest,
            "chains": {writer: astuple(one) for writer, one in self.chains.items()},
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode(data: bytes) -> Anchor:
    """Return the anchor of its bytes. Raises ValueError for any others."""
    try:
        content = json.loads(data)
        extents = {str(writer): Extent(*one) for writer, one in content["chains"].items()}
        anchor = Anchor(content["n"], content["at"], content["previous"], content["oldest"], extents)
    except (KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError(f"these {len(data)} bytes are no anchor") from err
    numbers = [
        anchor.n,
        anchor.at_ms,
        anchor.oldest,
        *(end for one in extents.values() for end in (one.first, one.last)),
    ]
    texts = [anchor.previous, *(hash for one in extents.values() for hash in (one.before, one.last_hash))]
    # A boolean is an int.
    if any(type(number) is not int for number in numbers) or any(not isinstance(text, str) for text in texts):
        raise ValueError(f"these {len(data)} bytes are no anchor")
    return anchor


@dataclass(frozen=True, slots=True, order=True)
class Stored:
    """Blob of an anchor, by its key. The bytes may be others than the key says."""

    n: int
    sha256: str

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.n:010d}-{self.sha256}"


def _stored(document: Mapping[str, Any]) -> Stored:
    """Return the anchor that a document names. A hash that is none is that of no blob."""
    sha256 = document.get("sha256")
    is_hash = isinstance(sha256, str) and _HASH.fullmatch(sha256)
    return Stored(document["_id"], str(sha256) if is_hash else FIRST_HASH)


class Anchors:
    """Writes and reads the anchors of a store. Raises ShoalError while MongoDB or the blobs are unavailable."""

    def __init__(self, collections: Collections, blobs: BlobStore, clock: Clock) -> None:
        self._collections = collections
        self._blobs = blobs
        self._clock = clock

    async def newest(self) -> Anchor | None:
        """Return the newest anchor that MongoDB names; None before the first.

        Raises:
            DataLoss: its blob is missing or damaged.
        """
        with translated("reading the newest audit anchor"):
            doc = await self._collections.audit_anchors.find_one(_NUMBERED, sort=[("_id", -1)])
        return None if doc is None else await self.read(_stored(doc))

    async def read(self, stored: Stored) -> Anchor:
        """Return an anchor. Raises DataLoss when its blob is missing, or has other bytes than its name says."""
        try:
            size = await self._blobs.size(stored.key)
            if size is None:
                await self._blobs.check()
                raise DataLoss(f"anchor {stored.n} is missing: blob {stored.key}")
            data = b"".join([piece async for piece in self._blobs.read(stored.key, 0, min(size, MAX_ANCHOR_BYTES))])
        except NotFound as err:
            raise DataLoss(f"anchor {stored.n} is missing: blob {stored.key}") from err
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            raise DataLoss(f"anchor {stored.n} was changed: blob {stored.key}")
        try:
            anchor = decode(data)
        except ValueError as err:
            raise DataLoss(f"anchor {stored.n}: {err}") from err
        if anchor.n != stored.n:
            raise DataLoss(f"anchor {stored.n} has the content of anchor {anchor.n}")
        return anchor

    async def stored(self) -> AsyncIterator[Stored]:
        """Yield the anchors that have a blob, in no order."""
        async for blob in self._blobs.list(FOLDER):
            if found := _KEY.fullmatch(blob.key):
                yield Stored(int(found[1]), found[2])

    async def named(self) -> list[Stored]:
        """Return the anchors that MongoDB names, in their order."""
        with translated("reading audit anchors"):
            found = self._collections.audit_anchors.find(_NUMBERED).sort("_id", 1)
            return [_stored(doc) async for doc in found]

    async def strays(self, most: int) -> list[str]:
        """Return ids of documents that are no numbers of anchors, at most `most`: this program writes none."""
        with translated("reading audit anchors"):
            found = self._collections.audit_anchors.find({"$nor": [_NUMBERED]}, {"_id": 1}).limit(most)
            return [repr(doc["_id"]) async for doc in found]

    async def extents(self, before: Anchor | None) -> dict[str, Extent]:
        """Return the extents of all chains now; `before` is the newest anchor."""
        known = before.chains if before is not None else {}
        found: dict[str, Extent] = {}
        with translated("reading the ends of the audit chains"):
            async for writer in chains.writers(self._collections.audit):
                one = await chains.extent(self._collections.audit, writer, known.get(writer))
                if one is not None:
                    found[writer] = one
        # A chain whose entries are missing without an anchor that says so stays, so that verification names it.
        return found | {writer: one for writer, one in known.items() if writer not in found and not one.is_empty}

    async def write(self, before: Anchor | None, extents: Mapping[str, Extent], oldest: int | None = None) -> bool:
        """Store the anchor after `before`. Return False when another instance has stored that anchor."""
        now = self._clock()
        if before is None:
            anchor = Anchor(1, milliseconds(now), FIRST_HASH, 1, extents)
        else:
            previous = hashlib.sha256(before.encode()).hexdigest()
            anchor = Anchor(before.n + 1, milliseconds(now), previous, oldest or before.oldest, extents)
        data = anchor.encode()
        stored = Stored(anchor.n, hashlib.sha256(data).hexdigest())
        await self._blobs.put(stored.key, data)
        with translated("writing an audit anchor"):
            try:
                await self._collections.audit_anchors.insert_one({"_id": stored.n, "sha256": stored.sha256, "at": now})
            except DuplicateKeyError:
                written = await self._collections.audit_anchors.find_one({"_id": stored.n})
                if written is not None and written["sha256"] == stored.sha256:
                    return True
                await self._blobs.remove(stored.key)
                return False
        return True

    async def remove_before(self, oldest: int) -> None:
        """Remove the anchors before number `oldest`, which the newest anchor names as the oldest one."""
        with translated("removing old audit anchors"):
            await self._collections.audit_anchors.delete_many({"_id": {"$lt": oldest}})
        async for stored in self.stored():
            if stored.n < oldest:
                await self._blobs.remove(stored.key)
