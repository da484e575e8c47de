"""A backup: all documents as of one moment, then every blob that they mean, then the manifest that makes it count.

    hold (no blob is removed) ──> snapshot session ──> each collection, in parts
                                      └─ at one cluster time: MongoDB's own snapshot, across collections
         ──> blobs by digest, those that are there already are read and compared, not copied ──> manifest

Interrupted, it leaves files and no manifest: no backup. The next one finds the blobs that were copied.
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
from services.store.backups.blob_copy import Copied, Named, blobs_meant, copied, known_damaged
from services.store.backups.hold import Hold
from services.store.backups.locations import BackupPlaces
from services.store.backups.manifest import Dumped, Manifest, ManifestPart
from services.store.backups.progress import Progress
from services.store.documents import RESTORES, Collections
from shoal.errors import DataLoss, FailedPrecondition, ShoalError, Unavailable

log = logging.getLogger(__name__)

NOT_CARRIED = frozenset({"holds", "graves", "exports", RESTORES, "fences", "leads", "tenant_rates"})
"""Collections about this very node, which would mean nothing in another: removals that wait, leaders and their tokens,
rates of the last seconds. A node has them before it has anything of its users."""
_AT_ONCE = 8
_KNOWN = 100_000
# Blobs that are remembered as being there, so that answers that are the same in many results are read there once.
_SNAPSHOT_TOO_OLD = 239


class Backup:
    """Makes backups of this store: of its database, and of `others` on the same MongoDB."""

    def __init__(
        self,
        collections: Collections,
        blobs: BlobStore,
        places: BackupPlaces,
        staging: Path,
        threads: Threads,
        clock: Callable[[], datetime],
        others: Sequence[str] = (),
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._places = places
        self._staging = staging
        self._threads = threads
        self._clock = clock
        self._others = tuple(others)

    async def run(self, to: str, *, trust_sizes: bool = False) -> AsyncGenerator[Progress, None]:
        """Makes one at the URL `to`; yields how far it is, at the end with `is_complete`.

        What lies there already is read and compared with its digest; with `trust_sizes` only its size is.

        Raises:
            InvalidArgument, PermissionDenied: a place that it may not use.
            FailedPrecondition: this store is half restored.
            Aborted: it stood still for too long. ShoalError: MongoDB, the blobs or the place are away.
        """
        await self._check_whole()
        target = await self._places.open(to, to_write=True, now=self._clock())
        backup_id = f"{self._clock():%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        wanted = self._staging / f"{uuid.uuid4().hex}.tmp"
        hold = Hold(self._collections, backup_id, self._clock)
        await hold.begin()
        try:
            async with hold:
                making = _Making(self, target, backup_id, wanted, hold, trust_sizes=trust_sizes)
                async for progress in making.run():
                    yield progress
        finally:
            wanted.unlink(missing_ok=True)
            with suppress(ShoalError):  # It ends by itself.
                await hold.end()

    async def _check_whole(self) -> None:
        # Half of a backup would be the newest one, which is what a restore takes.
        with translated("looking for a restore"):
            half = await self._collections.db[RESTORES].find_one({}, {"_id": 1})
        if half is not None:
            raise FailedPrecondition(f"this store is half restored from backup {half['_id']}: restore all of it first")


class _Making:
    """One backup."""

    def __init__(
        self, of: Backup, target: BlobStore, backup_id: str, wanted: Path, hold: Hold, *, trust_sizes: bool
    ) -> None:
        self._of = of
        self._target = target
        self._wanted = wanted
        self._hold = hold
        self._trust_sizes = trust_sizes
        self._known: set[str] = set()
        self._progress = Progress(backup_id)
        self._numbers = iter(range(1_000_000_000))
        self._blob_bytes = 0

    async def run(self) -> AsyncGenerator[Progress, None]:
        collections: list[Dumped] = []
        client = self._of._collections.db.client
        with translated("making a backup"), disk.translated("making a backup"), self._wanted.open("w") as wanted:
            async with client.start_session(snapshot=True) as session:
                async for database, name in self._names():
                    async for dumped in self._dumped(database, name, session, wanted.write):
                        collections.append(dumped)
                        yield self._progress
                cluster_time = str(session._snapshot_time)
        async for progress in self._copied():
            yield progress
        self._hold.check()
        yield await self._finished(collections, cluster_time)

    async def _names(self) -> AsyncIterator[tuple[AsyncDatabase[Document], str]]:
        db = self._of._collections.db
        for database in (db, *(db.client[name] for name in self._of._others)):
            for name in sorted(await database.list_collection_names(filter={"type": "collection"})):
                if name not in NOT_CARRIED and not name.startswith("system."):
                    yield database, name

    async def _dumped(
        self,
        database: AsyncDatabase[Document],
        name: str,
        session: AsyncClientSession,
        want: Callable[[str], object],
    ) -> AsyncIterator[Dumped]:
        """Dumps one collection. Notes which blobs its documents mean."""
        is_own = database.name == self._of._collections.db.name
        raw = database.get_collection(name, codec_options=dump.RAW)
        files: list[ManifestPart] = []
        documents = 0
        try:
            async for part in dump.parts(_found(raw.find({}, session=session))):
                files.append(await self._written(part))
                documents += len(part)
                self._progress = replace(self._progress, documents=self._progress.documents + len(part))
                self._miss(known_damaged(name, part) if is_own else [])
                for blob in blobs_meant(name, part) if is_own else ():
                    want(json.dumps([blob.key, blob.size, blob.sha256]) + "\n")
                    in_all = self._progress.blobs_in_all + 1
                    self._progress = replace(self._progress, blobs_in_all=in_all)
        except OperationFailure as err:
            if err.code != _SNAPSHOT_TOO_OLD:
                raise
            raise Unavailable(
                "MongoDB did not keep its snapshot for as long as reading all documents took: raise its parameter "
                "minSnapshotHistoryWindowInSeconds, then start again"
            ) from err
        yield Dumped("" if is_own else database.name, name, documents, tuple(files))

    def _miss(self, damaged: Sequence[str]) -> None:
        """Names what was found damaged before: there is nothing to copy, and the backup is not of everything."""
        before = self._progress
        self._progress = replace(
            before,
            missing=(*before.missing, *damaged),
            blobs=before.blobs + len(damaged),
            blobs_in_all=before.blobs_in_all + len(damaged),
        )

    async def _written(self, part: Sequence[RawBSONDocument]) -> ManifestPart:
        data = await self._of._threads.run(dump.compressed, part)
        key = f"{manifest.folder_of(self._progress.backup_id)}/documents/{next(self._numbers)}.bson.gz"
        await self._target.put(key, data)
        return ManifestPart(key, len(data), hashlib.sha256(data).hexdigest())

    async def _copied(self) -> AsyncGenerator[Progress, None]:
        """Copies what was wanted, several at once."""
        with self._wanted.open() as lines:
            while batch := [line for _, line in zip(range(_AT_ONCE), lines, strict=False)]:
                self._hold.check()
                await together(self._copy(Named(*json.loads(line))) for line in batch)
                yield self._progress

    async def _copy(self, blob: Named) -> None:
        of, key = self._of, manifest.blob_key(blob.sha256)
        try:
            trust_size = self._trust_sizes or blob.sha256 in self._known
            done = await copied(blob, of._blobs, self._target, key, of._staging, of._threads, trust_size=trust_size)
        except DataLoss as err:
            log.error("a backup goes on without what is damaged: %s", err)
            self._progress = replace(self._progress, missing=(*self._progress.missing, blob.sha256))
        else:
            self._count(blob, done)
        self._progress = replace(self._progress, blobs=self._progress.blobs + 1)

    def _count(self, blob: Named, done: Copied) -> None:
        if done is Copied.REPAIRED:
            log.warning("blob %s lay damaged in the place of the backup, and was replaced", blob.sha256)
        if len(self._known) < _KNOWN:
            self._known.add(blob.sha256)
        self._blob_bytes += blob.size
        before, is_new = self._progress, done is not Copied.THERE
        self._progress = replace(
            before,
            copied=before.copied + is_new,
            copied_bytes=before.copied_bytes + blob.size * is_new,
            repaired=before.repaired + (done is Copied.REPAIRED),
        )

    async def _finished(self, collections: Sequence[Dumped], cluster_time: str) -> Progress:
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


async def _found(cursor: AsyncIterator[Any]) -> AsyncIterator[RawBSONDocument]:
    async for doc in cursor:
        yield doc
