"""Verification: compares every blob with the document that refers to it, and reports differences.

It reads one blob at a time, so its load is that of one client. A damaged artifact is marked: it counts as missing, and
the next upload repairs it. The mark of an artifact that is intact again is removed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from enum import Enum

from mesh.mongo import Document, translated
from services.store.artifacts.artifacts import WITHOUT_BLOCKS
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.reading import Reader
from services.store.artifacts.stored import FOLDER, Stored, same_bytes, stored_of
from services.store.documents import Collections
from services.store.garbage.collector import batches
from services.store.garbage.uses import Uses
from services.store.results.large_responses import FOLDER as RESPONSES
from services.store.results.large_responses import LargeResponses
from services.store.results.result_documents import BlobRef, blob_of
from shoal.errors import Aborted, DataLoss, NotFound


class Kind(Enum):
    """Kinds of findings, numbered as in VerifyStoreResponse.Kind."""

    DAMAGED = 1
    STRAY = 2
    WHOLE_AGAIN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Difference between the blobs and the documents."""

    kind: Kind
    key: str
    message: str
    sha256: str = ""
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerificationProgress:
    """Progress of a verification."""

    blobs: int
    blobs_in_all: int
    """Number of blobs at the start."""
    bytes: int
    finding: Finding | None = None


class Verification:
    """Verifies the store."""

    def __init__(self, collections: Collections, blobs: BlobStore, reader: Reader, responses: LargeResponses) -> None:
        self._collections = collections
        self._blobs = blobs
        self._reader = reader
        self._responses = responses
        self._uses = Uses(collections)

    async def run(self, *, sizes_only: bool) -> AsyncGenerator[VerificationProgress, None]:
        """Verify all blobs and yield the progress after each. `sizes_only`: compare sizes and read no blob.

        Raises:
            ShoalError: MongoDB or the blobs are unavailable.
        """
        await self._blobs.check()
        with translated("verifying the store"):
            artifacts, results = self._collections.artifacts, self._collections.results
            with_blob = {"blob.key": {"$exists": True}}
            in_all = await artifacts.count_documents({}) + await results.count_documents(with_blob)
            blobs = nbytes = 0
            async for doc in artifacts.find({}, WITHOUT_BLOCKS if sizes_only else None):
                stored = stored_of(doc)
                finding = await self._artifact(stored, doc, sizes_only)
                blobs, nbytes = blobs + 1, nbytes + stored.size
                yield VerificationProgress(blobs, in_all, nbytes, finding)
            async for doc in results.find(with_blob, {"blob": 1}):
                if ref := blob_of(doc):
                    finding = await self._response(ref, doc["_id"], sizes_only)
                    blobs, nbytes = blobs + 1, nbytes + ref.size
                    yield VerificationProgress(blobs, in_all, nbytes, finding)
            async for stray in self._strays():
                yield VerificationProgress(blobs, in_all, nbytes, stray)

    async def _artifact(self, stored: Stored, doc: Document, sizes_only: bool) -> Finding | None:
        try:
            await (self._reader.check_size(stored) if sizes_only else self._reader.verify(stored))
        # The artifact was removed or replaced during the verification.
        except (NotFound, Aborted):
            return None
        except DataLoss as err:
            users = tuple(await self._uses.users(stored.digest))
            return Finding(Kind.DAMAGED, stored.key, err.message, stored.digest, users)
        if not doc.get("damaged") or sizes_only:
            return None
        await self._collections.artifacts.update_one(same_bytes(stored), {"$unset": {"damaged": ""}})
        return Finding(Kind.WHOLE_AGAIN, stored.key, "its bytes are intact again", stored.digest)

    async def _response(self, ref: BlobRef, job_id: str, sizes_only: bool) -> Finding | None:
        try:
            if not sizes_only:
                await self._responses.read(ref)
            elif (size := await self._blobs.size(ref.key)) != ref.size:
                raise DataLoss("it is missing" if size is None else f"{size} bytes of {ref.size}")
        except DataLoss as err:
            if await self._collections.results.find_one({"_id": job_id, "blob.key": ref.key}, {"_id": 1}) is None:
                # The result was removed during the verification.
                return None
            return Finding(Kind.DAMAGED, ref.key, err.message, ref.sha256, (f"the result of job {job_id}",))
        return None

    async def _strays(self) -> AsyncIterator[Finding]:
        for folder in (FOLDER, RESPONSES):
            async for blobs in batches(self._blobs.list(folder)):
                for stray in await self._stray_findings({blob.key: blob.size for blob in blobs}):
                    yield stray

    async def _stray_findings(self, sizes: dict[str, int]) -> list[Finding]:
        pending = self._collections.pending_deletions.find({"_id": {"$in": list(sizes)}}, {"_id": 1})
        known = await self._uses.used_keys(sizes) | {doc["_id"] async for doc in pending}
        return [
            Finding(Kind.STRAY, key, f"{sizes[key]} bytes without a document: garbage collection will remove them")
            for key in sorted(set(sizes) - known)
        ]
