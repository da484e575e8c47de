"""Backup: all documents as of one moment, then every blob that they refer to, then the manifest, which completes it.

    hold (no blob is removed) ──> snapshot session ──> each collection, in parts
                                      └─ at one cluster time: MongoDB's own snapshot, across collections
         ──> blobs by digest; those already present are read and compared, not copied ──> manifest

An interrupted backup leaves files without a manifest: it cannot be restored. The next backup reuses the copied blobs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from mesh.mongo import Document, translated
from mesh.process.tasks import together
from mesh.process.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.backups import dump, manifest
from services.store.backups.blob_copy import CopyOutcome, blobs_referenced, copy_blob, known_damaged
from services.store.backups.hold import Hold
from services.store.backups.locations import BackupLocations
from services.store.backups.manifest import DumpedCollection, Manifest, ManifestPart
from services.store.backups.progress import BackupProgress
from services.store.documents import RESTORES, Collections
from services.store.results.result_documents import BlobRef
from shoal.errors import DataLoss, FailedPrecondition, ShoalError, Unavailable

log = logging.getLogger(__name__)

NOT_CARRIED = frozenset(
    {"holds", "graves", "exports", RESTORES, "fences", "leads", "removals", "tenant_rates", "audit", "audit_anchors"}
)
"""Collections that belong to this node only: pending deletions, leader leases and their tokens, rates of the last
seconds, and the audit log, whose chains no other node continues. A node has them before it has any user data, and a
restore ignores them."""
_AT_ONCE = 8
# Digests remembered as verified, so that a blob shared by many results is read once in the backup.
_KNOWN = 100_000
_SNAPSHOT_TOO_OLD = 239


class Backup:
    """Makes backups of this store: of its database, and of `others` on the same MongoDB."""

    def __init__(
        self,
        collections: Collections,
        blobs: BlobStore,
        locations: BackupLocations,
        staging: Path,
        threads: Threads,
        clock: Callable[[], datetime],
        others: Sequence[str] = (),
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._locations = locations
        self._staging = staging
        self._threads = threads
        self._clock = clock
        self._others = tuple(others)

    async def run(self, to: str, *, trust_sizes: bool = False) -> AsyncGenerator[BackupProgress, None]:
        """Make a backup at the URL `to`. Yields its progress, at the end with `is_complete`.

        Blobs that are already there are read and compared with their digest; with `trust_sizes` only by size.

        Raises:
            InvalidArgument, PermissionDenied: the location may not be used.
            FailedPrecondition: this store is half restored.
            Aborted: the backup stalled for too long. ShoalError: MongoDB, the blobs or the location are unavailable.
        """
        await self._check_not_half_restored()
        target = await self._locations.open(to, to_write=True, now=self._clock())
        backup_id = f"{self._clock():%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        blob_list = self._staging / f"{uuid.uuid4().hex}.tmp"
        hold = Hold(self._collections, backup_id, self._clock)
        await hold.begin()
        try:
            async with hold:
                run = _BackupRun(self, target, backup_id, blob_list, hold, trust_sizes=trust_sizes)
                async for progress in run.run():
                    yield progress
        finally:
            blob_list.unlink(missing_ok=True)
            # A hold that cannot be ended now expires.
            with suppress(ShoalError):
                await hold.end()

    async def _check_not_half_restored(self) -> None:
        # A backup of half a store would be the newest one, which a restore chooses by default.
        with translated("looking for a restore"):
            half = await self._collections.db[RESTORES].find_one({}, {"_id": 1})
        if half is not None:
            raise FailedPrecondition(f"this store is half restored from backup {half['_id']}: restore all of it first")


class _BackupRun:
    """Run of one backup. `blob_list`: temporary file of the blobs to copy, a JSON line each."""

    def __init__(
        self, of: Backup, target: BlobStore, backup_id: str, blob_list: Path, hold: Hold, *, trust_sizes: bool
    ) -> None:
        self._of = of
        self._target = target
        self._blob_list = blob_list
        self._hold = hold
        self._trust_sizes = trust_sizes
        self._known: set[str] = set()
        self._progress = BackupProgress(backup_id)
        self._numbers = iter(range(1_000_000_000))
        self._blob_bytes = 0

    async def run(self) -> AsyncGenerator[BackupProgress, None]:
        collections: list[DumpedCollection] = []
        client = self._of._collections.db.client
        with translated("making a backup"), disk.translated("making a backup"), self._blob_list.open("w") as blob_list:
            async with client.start_session(snapshot=True) as session:
                async for database, name in self._names():
                    async for dumped in self._dump(database, name, session, blob_list.write):
                        collections.append(dumped)
                        yield self._progress
                cluster_time = str(session._snapshot_time)
        async for progress in self._copy_blobs():
            yield progress
        self._hold.check()
        yield await self._write_manifest(collections, cluster_time)

    async def _names(self) -> AsyncIterator[tuple[AsyncDatabase[Document], str]]:
        db = self._of._collections.db
        for database in (db, *(db.client[name] for name in self._of._others)):
            for name in sorted(await database.list_collection_names(filter={"type": "collection"})):
                if name not in NOT_CARRIED and not name.startswith("system."):
                    yield database, name

    async def _dump(
        self,
        database: AsyncDatabase[Document],
        name: str,
        session: AsyncClientSession,
        list_blob: Callable[[str], object],
    ) -> AsyncIterator[DumpedCollection]:
        """Dump one collection, and list the blobs that its documents refer to."""
        is_own = database.name == self._of._collections.db.name
        raw = database.get_collection(name, codec_options=dump.RAW)
        files: list[ManifestPart] = []
        documents = 0
        try:
            async for part in dump.parts(_typed(raw.find({}, session=session))):
                files.append(await self._write_part(part))
                documents += len(part)
                self._progress = replace(self._progress, documents=self._progress.documents + len(part))
                self._add_missing(known_damaged(name, part) if is_own else [])
                for blob in blobs_referenced(name, part) if is_own else ():
                    list_blob(json.dumps([blob.key, blob.size, blob.sha256]) + "\n")
                    in_all = self._progress.blobs_in_all + 1
                    self._progress = replace(self._progress, blobs_in_all=in_all)
        except OperationFailure as err:
            if err.code != _SNAPSHOT_TOO_OLD:
                raise
            raise Unavailable(
                "MongoDB did not keep its snapshot for as long as reading all documents took: raise its parameter "
                "minSnapshotHistoryWindowInSeconds, then start again"
            ) from err
        yield DumpedCollection("" if is_own else database.name, name, documents, tuple(files))

    def _add_missing(self, damaged: Sequence[str]) -> None:
        """Report artifacts that an earlier verification found damaged as missing, because they cannot be copied."""
        before = self._progress
        self._progress = replace(
            before,
            missing=(*before.missing, *damaged),
            blobs=before.blobs + len(damaged),
            blobs_in_all=before.blobs_in_all + len(damaged),
        )

    async def _write_part(self, part: Sequence[RawBSONDocument]) -> ManifestPart:
        data = await self._of._threads.run(dump.compressed, part)
        key = f"{manifest.folder_of(self._progress.backup_id)}/documents/{next(self._numbers)}.bson.gz"
        await self._target.put(key, data)
        return ManifestPart(key, len(data), hashlib.sha256(data).hexdigest())

    async def _copy_blobs(self) -> AsyncGenerator[BackupProgress, None]:
        """Copy the listed blobs, several at once."""
        with self._blob_list.open() as lines:
            while batch := [line for _, line in zip(range(_AT_ONCE), lines, strict=False)]:
                self._hold.check()
                await together(self._copy(BlobRef(*json.loads(line))) for line in batch)
                yield self._progress

    async def _copy(self, blob: BlobRef) -> None:
        of, key = self._of, manifest.blob_key(blob.sha256)
        try:
            trust_size = self._trust_sizes or blob.sha256 in self._known
            done = await copy_blob(blob, of._blobs, self._target, key, of._staging, of._threads, trust_size=trust_size)
        except DataLoss as err:
            log.error(
                "the backup continues without a damaged blob: %(error)s", {"event": "backup.blob_damaged", "error": err}
            )
            self._progress = replace(self._progress, missing=(*self._progress.missing, blob.sha256))
        else:
            self._count(blob, done)
        self._progress = replace(self._progress, blobs=self._progress.blobs + 1)

    def _count(self, blob: BlobRef, done: CopyOutcome) -> None:
        if done is CopyOutcome.REPAIRED:
            log.warning(
                "blob %(blob)s was damaged in the backup location, and was replaced",
                {"event": "backup.blob_replaced", "blob": blob.sha256},
            )
        if len(self._known) < _KNOWN:
            self._known.add(blob.sha256)
        self._blob_bytes += blob.size
        before, is_new = self._progress, done is not CopyOutcome.PRESENT
        self._progress = replace(
            before,
            copied=before.copied + is_new,
            copied_bytes=before.copied_bytes + blob.size * is_new,
            repaired=before.repaired + (done is CopyOutcome.REPAIRED),
        )

    async def _write_manifest(self, collections: Sequence[DumpedCollection], cluster_time: str) -> BackupProgress:
        done = self._progress
        made = Manifest(
            id=done.backup_id,
            cluster_time=cluster_time,
            finished_at=self._of._clock().isoformat(timespec="seconds"),
            collections=tuple(collections),
            blobs=done.blobs - len(done.missing),
            blob_bytes=self._blob_bytes,
            missing=tuple(sorted(set(done.missing))),
        )
        await self._target.put(f"{manifest.folder_of(made.id)}/{manifest.NAME}", manifest.encoded(made))
        return replace(done, cluster_time=cluster_time, is_complete=True)


async def _typed(cursor: AsyncIterator[Any]) -> AsyncIterator[RawBSONDocument]:
    async for doc in cursor:
        yield doc
